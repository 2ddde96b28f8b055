"""Likelihood, accuracy and exactness of a flow on images."""
