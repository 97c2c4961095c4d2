"""The reverse map, and what takes pages away through it: reclaim, unmapping, migration within the host."""
