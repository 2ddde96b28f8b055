"""Inverse affine transform with guidance, noise to data."""
