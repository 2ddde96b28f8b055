"""Inverse of any causal conditioner."""
