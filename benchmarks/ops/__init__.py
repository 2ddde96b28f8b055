"""Benchmarks of single ops, one file per op."""
