"""Read Stable Diffusion checkpoints: diffusers folders and single files in the original (LDM) layout."""
