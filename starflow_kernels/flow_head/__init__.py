"""Flow head: final norm, projection and affine transform."""
