"""Device memory and mirrors: hmm_range_fault, migration to and fro, exclusive access, dma-buf."""
