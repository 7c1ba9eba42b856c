"""`speed`, `compare`, `overhead`, `swap`: cases, the gate, timing, and what the numbers say."""
