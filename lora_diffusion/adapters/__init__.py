"""Adapters as values: layers, the adapter, blends of adapters and what a weight comes to at each module."""
