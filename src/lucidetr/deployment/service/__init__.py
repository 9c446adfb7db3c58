"""The detector as a small web service: pictures in by HTTP, JSON out, one process that computes."""
