"""Causal attention over a whole sequence."""
