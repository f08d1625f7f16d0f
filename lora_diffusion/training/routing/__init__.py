"""Training of gates that weight frozen adapters per block and denoising stage."""
