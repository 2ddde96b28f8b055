"""Flow of one attention layer."""
