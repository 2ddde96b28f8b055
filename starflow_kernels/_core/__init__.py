"""Foundation of every op: registration, dispatch, argument checks, numerics, compiled libraries."""
