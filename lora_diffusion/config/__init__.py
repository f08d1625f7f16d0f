"""Settings, declared once: flags, file format, help texts and validation derive from them."""
