"""The picture world: 128 px scenes with captions, drawn by code, for the embedded base and its measurements."""
