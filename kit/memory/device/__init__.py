"""Device memory: unaddressable frames, migration to and fro, exclusive access, dma-buf."""
