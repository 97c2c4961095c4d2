"""Address spaces: areas, where they lie, and what drivers enter in them."""
