"""Addition of a bias, and exact GELU."""
