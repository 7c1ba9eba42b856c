"""What `python -m rowmax.bench new` writes: each a whole file that both judges accept."""
