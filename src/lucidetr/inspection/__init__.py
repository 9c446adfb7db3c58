"""What happened inside: figures of a run."""
