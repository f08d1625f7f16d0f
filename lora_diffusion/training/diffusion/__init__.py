"""Noise schedules, noise, timesteps and losses of diffusion training."""
