"""The studio: a browser interface (Gradio) for the library. Each action has an equivalent command."""
