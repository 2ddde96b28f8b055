"""Bias and exact GELU."""
