"""Triton backend of the block inverse: sessions, the sequential sampler and the parallel sweeps."""
