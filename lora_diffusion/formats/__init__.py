"""Doors to files: each dialect of adapter has a file here, and nothing else knows it."""
