"""Rows of text to batches: `examples` reads and checks them, `causal` makes tokens of them, `sampling` orders them."""
