"""Foundation of every op: registration, dispatch, argument checks, compiled libraries. Imports no op and no Triton."""
