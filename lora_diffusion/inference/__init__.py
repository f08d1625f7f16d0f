"""Blends in a live base, and pictures made with it."""
