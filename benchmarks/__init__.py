"""Speed beside peers: each benchmark runs both in turn in one process and prints medians and their ratio."""
