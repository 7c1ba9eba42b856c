"""Who computes: the reference, the CPU kernels in Numba and C++, the GPU kernels in Triton."""
