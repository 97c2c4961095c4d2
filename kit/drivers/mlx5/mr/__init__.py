"""mr.c and umr.c: registering and deregistering, the mkey cache, translations."""
