"""Page tables: one radix class with a geometry, the CPU's with what its entries can be, and masks of pages."""
