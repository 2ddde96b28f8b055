"""Rates of a GPU that the models of bytes take, for an H200; no GPU has measured them yet."""

# Bytes per second of device memory and of the L2 cache: estimates.
MEMORY = 4.3e12
L2 = 5.5e12
# Operations per second of matrix products: tensor cores by two-byte values, multiply-adds of float32, as published.
TENSOR = 989e12
FLOAT32 = 67e12
