"""Data sets, caches of latents and prompts."""
