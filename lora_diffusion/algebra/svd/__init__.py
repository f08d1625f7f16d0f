"""Singular value decompositions of low-rank products, and how a rank is chosen."""
