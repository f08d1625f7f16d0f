"""Training of adapters: the training loop, its inputs, objectives, methods and optimizers."""
