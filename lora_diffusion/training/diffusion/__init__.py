"""Noise, timesteps, noise schedules and losses."""
