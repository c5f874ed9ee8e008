"""The fused operators: contract, NumPy reference and kernels, one folder each."""
