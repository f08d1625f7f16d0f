"""Training objectives: the denoising loss, prior preservation and concept sliders."""
