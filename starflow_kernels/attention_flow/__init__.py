"""Flow with one attention layer as its network."""
