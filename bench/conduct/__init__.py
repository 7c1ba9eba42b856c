"""How a candidate behaves: what `verify` and `speed` ask of it beside the right result."""
