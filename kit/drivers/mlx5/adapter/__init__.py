"""The adapter: keys, queue pairs, messages, and the hardware's side of UMR."""
