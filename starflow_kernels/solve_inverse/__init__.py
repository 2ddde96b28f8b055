"""Inverse of a flow with any causal conditioner."""
