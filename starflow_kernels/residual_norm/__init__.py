"""Residual sum and norm."""
