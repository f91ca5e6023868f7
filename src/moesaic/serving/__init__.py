"""Answers of a trained mixture, one at a time or to many who ask at once."""
