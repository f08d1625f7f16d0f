"""Adapters made smaller, and adapters out of differences of weights."""
