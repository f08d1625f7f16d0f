"""Tasks that make pictures."""
