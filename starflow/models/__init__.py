"""Flow models, their configuration, checkpoints and certificates."""
