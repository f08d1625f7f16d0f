"""Find adapters in folders by path, name or hash, and read and write presets and recipes."""
