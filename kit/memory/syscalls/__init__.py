"""What a program asks of its address space: mmap, munmap, mprotect, mremap, madvise, fork, exit."""
