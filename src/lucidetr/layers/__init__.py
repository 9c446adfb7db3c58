"""Parts that know nothing of detection: attention, feed-forward, norms, positions, residual paths."""
