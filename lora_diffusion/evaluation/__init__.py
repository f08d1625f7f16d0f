"""Measure adapters and generated images, and plot the results."""
