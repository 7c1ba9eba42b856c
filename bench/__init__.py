"""rowmax.bench: measures the kernels against every path that PyTorch itself offers."""
