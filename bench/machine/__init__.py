"""The machine that numbers are taken on, and its limits."""
