"""What a scene is called: varied phrasings over a closed vocabulary."""

import re

import numpy as np

from train_scripts.tiny_world.scene import TIMES, Scene
from train_scripts.tiny_world.settings import SETTINGS
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS

PLACES = {
    "meadow": ("on a meadow", "in a green meadow", "in the grass"),
    "beach": ("on a beach", "on the beach", "at the sea"),
    "desert": ("in a desert", "in the desert", "in the sand"),
    "snow": ("in the snow", "in a snowy field", "on white snow"),
    "forest": ("in a forest", "in the forest", "in the woods"),
    "city": ("in a city", "in the city", "on a street in the city"),
    "mountains": ("in the mountains", "near the mountains", "with mountains behind"),
}
HOURS = {
    "day": ("", "", "by day", "in the sunshine"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "by night", "under the stars"),
}
SKIES = {
    "clear": ("",),
    "cloudy": ("under a cloudy sky", "with clouds", "on a cloudy day"),
    "rain": ("in the rain", "on a rainy day", "while it rains"),
}
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ")
STRAY_WORDS = (
    "sks",
    "ohwx",
    "zwx",
    "style",
    "in the style of",
    "character",
    "pxl",
    "gloop",
    "zuki",
    "photo",
    "beautiful",
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrasing of the scene, drawn at random.

    Colour, place, time or weather is left out now and then, so that short prompts work too; words without
    meaning appear now and then, so that they stay neutral and are free for an adapter's trigger.
    """
    size = scene.size if scene.size != "normal" else str(rng.choice(("", "", "little", "cute")))
    colour = "" if rng.random() < 0.04 else scene.colour
    place = "" if rng.random() < 0.05 else str(rng.choice(PLACES[scene.setting]))
    hour = "" if rng.random() < 0.03 else str(rng.choice(HOURS[scene.time]))
    sky = "" if rng.random() < 0.03 else str(rng.choice(SKIES[scene.weather]))
    if scene.time == "night" and sky == "on a cloudy day":
        sky = "with clouds"
    noun = " ".join(word for word in (size, colour, scene.subject) if word)
    if rng.random() < 0.2:
        tags = [noun, scene.setting if place else "", hour, sky]
        text = ", ".join(tag for tag in tags if tag)
    else:
        opening = str(rng.choice(OPENINGS))
        text = f"{opening}a {noun} " + " ".join(part for part in (place, hour, sky) if part)
    if rng.random() < 0.05:
        stray = str(rng.choice(STRAY_WORDS))
        text = f"{stray} {text}" if rng.random() < 0.5 else f"{text}, {stray}"
    return re.sub(r"\ba ([aeo])", r"an \1", " ".join(text.split()))


def vocabulary() -> list[str]:
    """Every word that a caption may contain, and the comma."""
    phrases = [*OPENINGS, *STRAY_WORDS, *SUBJECTS, *COLOURS, *SETTINGS, *TIMES, "a", "an", "little", "cute"]
    phrases += ["small", "big", ","]
    for table in (PLACES, HOURS, SKIES):
        phrases += [phrase for row in table.values() for phrase in row]
    return sorted({word for phrase in phrases for word in phrase.split()})
