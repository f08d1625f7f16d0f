"""Weights in prompts, such as `a (red:1.3) house`, and chunks of tokens. Knows nothing of models."""
