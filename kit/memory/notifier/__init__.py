"""MMU notifiers: who wants to hear, before entries of an address space change."""
