"""Experts that are slices of a feed-forward layer."""
