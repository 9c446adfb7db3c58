"""lucidetr: DETR from scratch that you can read, train on one machine, and look inside."""
