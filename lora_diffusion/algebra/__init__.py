"""Linear algebra on adapters: combine them, reduce their rank or size, and measure them."""
