"""torch.nn's modules with rowmax's forward."""
