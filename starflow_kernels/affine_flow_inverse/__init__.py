"""Inverse affine transform with guidance, from noise to data."""
