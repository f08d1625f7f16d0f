"""Pictures and captions for training, up to what a model is shown. Knows nothing of models."""
