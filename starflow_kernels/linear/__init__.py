"""Linear layer for training."""
