"""What a training run leaves for a person to look at: curves, a sheet of samples, and a page with everything."""
