"""CPU page faults, by what the entry and the area say."""
