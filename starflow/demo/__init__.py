"""Web page of `starflow demo`."""
