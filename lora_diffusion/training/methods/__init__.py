"""Trainable adapter layers, one module per method, and their injection into a base model."""
