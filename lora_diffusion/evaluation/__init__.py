"""Measures of what an adapter does, and pictures that show it."""
