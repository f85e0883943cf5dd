"""Training with SGD and SVAG, a grid of runs at a time."""
