"""Where a scene takes place: light, weather, scenery and settings."""
