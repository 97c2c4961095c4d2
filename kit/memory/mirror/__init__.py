"""What a device needs to mirror an address space: MMU notifiers and hmm_range_fault."""
