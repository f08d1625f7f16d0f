"""Adapters, their layers, blends of adapters, and the arithmetic of weighted deltas."""
