"""rowmax.kernels: fused attention and normalisation for PyTorch."""
