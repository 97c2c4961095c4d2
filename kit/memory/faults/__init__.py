"""CPU page faults, by what the entry and the area say, and accesses that take them."""
