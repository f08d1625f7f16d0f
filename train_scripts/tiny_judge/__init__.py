"""The judge of the embedded base: what a picture shows, how well it is drawn, and how near it is to a style."""
