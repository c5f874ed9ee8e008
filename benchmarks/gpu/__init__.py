"""What the GPU can do, and what of it the kernels and an engine reach: `python -m benchmarks.gpu --help`."""
