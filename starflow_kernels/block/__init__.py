"""Flow block, both directions."""
