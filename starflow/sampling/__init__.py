"""Sampling: one batch, or many files by many processes."""
