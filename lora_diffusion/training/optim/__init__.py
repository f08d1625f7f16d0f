"""Optimizers, learning rates, moving averages and norm limits."""
