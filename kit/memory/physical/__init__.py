"""Physical memory: frames with content, pages with their counts and flags, swap."""
