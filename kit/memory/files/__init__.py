"""Files and their page cache."""
