"""Flow head: norm, projection and affine transform."""
