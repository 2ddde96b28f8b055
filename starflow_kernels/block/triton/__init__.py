"""Sampling through a whole block in Triton: sessions, the sequential step, parallel sweeps, and their kernels."""
