"""Trainable updates of frozen modules: one file for each way of writing a delta."""
