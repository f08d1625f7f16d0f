"""Inputs of the training loop: encoded images and captions, samples, batches, and the cache of encodings."""
