"""Rows of text to batches: `files` and `examples` read them, `shapes` checks each, `causal` tokenizes."""
