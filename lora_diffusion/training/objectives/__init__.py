"""What the denoiser is trained for."""
