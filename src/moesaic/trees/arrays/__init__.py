"""Hoeffding trees in arrays: a whole pool of them is a few arrays, compiled by numba."""
