"""Address spaces: areas, how the CPU and drivers reach pages through them, and how entries go."""
