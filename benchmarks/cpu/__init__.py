"""Benchmarks of whole models on a CPU."""
