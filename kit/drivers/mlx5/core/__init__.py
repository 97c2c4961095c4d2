"""What mlx5_core and the kernel lend the driver: commands, event queues, DMA mapping, work queues."""
