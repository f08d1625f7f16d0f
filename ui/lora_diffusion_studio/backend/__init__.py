"""What the tabs do, without Gradio: generation, grids, presets, merging, training and the adapter library."""
