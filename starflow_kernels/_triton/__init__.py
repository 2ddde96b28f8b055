"""Shared parts of the Triton backends."""
