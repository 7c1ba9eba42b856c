"""What is timed beside rowmax: torch's own paths, packages and inference engines."""
