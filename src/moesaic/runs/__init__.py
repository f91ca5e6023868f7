"""A run as people write it (`settings`, `recipe`, `sources`) and as it lies on disk (`folder`, `results`)."""
