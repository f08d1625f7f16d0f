"""Exact and randomized singular value decompositions of deltas, and rules that choose a rank."""
