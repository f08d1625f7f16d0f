"""Merging into a checkpoint, in any layout, and taking it out again."""
