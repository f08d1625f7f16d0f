"""How a drawing becomes pixels: the flat style, styles the base learns, and styles kept for adapters."""
