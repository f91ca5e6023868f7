"""Scores of runs: `answers` to rows, `metrics` of answers, `run` for a run folder."""
