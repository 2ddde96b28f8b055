"""Sampling of one batch, or of many files by many processes."""
