"""Flow block in both directions."""
