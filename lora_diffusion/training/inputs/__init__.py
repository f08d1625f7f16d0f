"""What the training loop is fed: latents, captions, samples, batches and their cache."""
