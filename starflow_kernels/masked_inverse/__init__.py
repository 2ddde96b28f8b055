"""Inverse of an autoregressive transform with a masked network."""
