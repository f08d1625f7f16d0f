"""Merge adapters and checkpoints into a checkpoint of any layout, and undo such a merge."""
