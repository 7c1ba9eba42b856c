"""The peers that rowmax is compared with: torch's own paths, packages, inference engines."""
