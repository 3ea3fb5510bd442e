"""Reproduces the paper's tables and figures, and studies what it leaves open."""
