"""The studio: a Gradio app over the library. Everything that it does is a library call with a command-line twin."""
