"""Base models and what stands around them: how they are found and loaded, heads for encoders, number formats, nano."""
