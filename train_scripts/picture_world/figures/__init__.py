"""What stands in a scene: subjects, characters and props."""
