"""Checkpoints on disk: folders in diffusers' layout and single files in the original layout."""
