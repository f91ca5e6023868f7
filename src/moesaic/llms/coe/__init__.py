"""Composition of Experts (Jain et al. 2024, arXiv 2412.01868): a prompt's category, and for each category one expert.

The formulas of the paper are not public; what stands here is a reconstruction, and says so.
"""
