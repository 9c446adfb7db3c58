"""The detector as its users meet it: load, predict, draw."""
