"""The public functions, masks and biases: docstrings and argument checks."""
