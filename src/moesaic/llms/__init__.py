"""Whole language models as experts: which one answers a prompt, what it costs, and one endpoint for all of them."""
