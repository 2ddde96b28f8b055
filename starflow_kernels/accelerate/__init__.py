"""Faster methods for modules of other libraries, by one call. Importing it needs only torch."""
