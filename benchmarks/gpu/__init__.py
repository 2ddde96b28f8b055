"""Benchmarks of the GPU backends, and the tool that compiles their Triton kernels without a GPU."""
