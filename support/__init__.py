"""What any trainer needs, and nothing of the method: config, files, ranks, checkpoints, models, memory, statistics."""
