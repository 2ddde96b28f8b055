"""Flow models, their configurations, checkpoints and certificates."""
