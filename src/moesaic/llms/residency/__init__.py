"""Which models are in memory: policies, an engine that loads and evicts, a simulator of larger machines."""
