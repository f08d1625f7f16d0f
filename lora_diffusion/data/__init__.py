"""Read training images and captions, and prepare the crops and batches that a training step takes."""
