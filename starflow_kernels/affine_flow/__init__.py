"""Affine flow transform, data to noise."""
