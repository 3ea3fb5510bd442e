"""Provides what any trainer needs and nothing of the method: settings, ranks, files, models."""
