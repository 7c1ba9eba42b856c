"""rowmax.transformer: the reference encoder-decoder Transformer on rowmax.kernels."""
