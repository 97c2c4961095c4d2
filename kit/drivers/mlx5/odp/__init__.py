"""odp.c: page faults, implicit regions, invalidation, prefetch."""
