"""Apply blends to a loaded base model and generate images with it."""
