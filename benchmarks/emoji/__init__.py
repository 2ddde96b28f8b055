"""Judges, times and a picture of a text-to-image pipeline of emoji."""
