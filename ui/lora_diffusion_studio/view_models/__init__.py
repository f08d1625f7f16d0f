"""What the widgets of the Blend tab hold and show, as values: slots, forms, cards and plots. No Gradio."""
