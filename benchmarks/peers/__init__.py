"""Other implementations that ours are compared with."""
