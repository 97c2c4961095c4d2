"""Physical memory: frames with content, pages with their counts and flags, device memory plugged in, swap."""
