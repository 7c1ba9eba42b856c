"""The forms of the Triton kernels: compiled, timed and chosen."""
