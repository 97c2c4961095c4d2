"""What `make bench` measures: each figure beside its limit, both from the same run."""
