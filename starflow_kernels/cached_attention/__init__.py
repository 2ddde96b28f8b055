"""Attention of new tokens over a KV cache."""
