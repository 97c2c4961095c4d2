"""The reverse map, and what takes pages and entries away: zapping, unmapping, reclaim, migration within the host."""
