"""How predictions are compared with the truth: the optimal matching and the set loss."""
