"""Load and quantize base models, encode prompts, and add learned tokens to text encoders."""
