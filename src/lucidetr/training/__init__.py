"""From random weights to a detector: loop, optimiser, schedule, checkpoints, log."""
