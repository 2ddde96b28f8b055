"""Parts that the Triton backends of all ops share."""
