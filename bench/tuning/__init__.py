"""The configs of the Triton kernels: compiled, timed and chosen."""
