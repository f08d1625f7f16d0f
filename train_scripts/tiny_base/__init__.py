"""The embedded base: its architecture and the training of its parts on the picture world."""
