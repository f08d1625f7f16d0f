"""Optimizers, learning rates and their schedules, the moving average of parameters, and max-norm regularization."""
