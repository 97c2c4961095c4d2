"""core/umem*.c: the memory that a region is made of."""
