"""Serving models whose experts are known before they run: batches by expert, experts on disk, loads ahead of time."""
