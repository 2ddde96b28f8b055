"""Affine flow transform from data to noise."""
