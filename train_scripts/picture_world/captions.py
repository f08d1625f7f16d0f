"""Captions of scenes: varied phrasings over a closed vocabulary, each word one token of the embedded base."""

import re

import numpy as np

from train_scripts.picture_world.figures.props import PROPS
from train_scripts.picture_world.figures.subjects import SUBJECTS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.places.settings import SEASONAL, SETTINGS
from train_scripts.picture_world.scene import Figure, Scene, choose

Rng = np.random.Generator
PLACES: dict[str, tuple[str, ...]] = {
    "meadow": ("on a meadow", "in a green meadow", "in the grass"),
    "beach": ("on a beach", "on the beach", "at the sea"),
    "desert": ("in a desert", "in the desert", "in the sand"),
    "snow": ("in the snow", "in a snowy field", "on white snow"),
    "forest": ("in a forest", "in the forest", "in the woods"),
    "city": ("in a city", "in the city", "on a street in the city"),
    "mountains": ("in the mountains", "near the mountains", "with mountains behind"),
    "farm": ("on a farm", "at the farm", "in front of a barn"),
    "moon": ("on the moon", "on the moon in space", "in space"),
    "room": ("in a room", "in the room", "indoors by the window"),
}
HOURS: dict[str, tuple[str, ...]] = {
    "day": ("", "", "by day", "in the sunshine"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "by night", "under the stars"),
}
SKIES: dict[str, tuple[str, ...]] = {
    "clear": ("",),
    "cloudy": ("under a cloudy sky", "with clouds"),
    "rain": ("in the rain", "on a rainy day", "while it rains"),
    "snow": ("while it snows", "in falling snow"),
}
SEASON_WORDS: dict[str, tuple[str, ...]] = {
    "spring": ("in spring",),
    "summer": ("", "", "in summer"),
    "autumn": ("in autumn",),
    "winter": ("in winter",),
}
SIDE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
DISTANCE_WORDS = {"near": ("big", "close"), "normal": ("",), "far": ("small", "little")}
PROP_WORDS = {name: ("with an umbrella" if name == "umbrella" else f"with a {name}") for name in PROPS}
JOINTS = ("and", "beside", "next to")
OPENINGS = ("", "", "", "a picture of ", "an image of ")
STYLES: dict[str, tuple[str, ...]] = {
    "flat": ("",),
    "sketch": ("a pencil sketch of ", "pencil sketch style"),
    "chalk": ("a chalk drawing of ", "chalk style"),
    "comic": ("a comic of ", "comic style"),
    "crayon": ("a crayon drawing of ", "crayon style"),
    "mosaic": ("a mosaic of ", "mosaic style"),
    "pastel": ("a pastel painting of ", "pastel style"),
    "gray": ("a gray print of ", "gray style"),
    "neon": ("a neon sign of ", "neon style"),
}
"""Styles that the base learns by name, each as an opening and as a tag at the end."""
STRAY_WORDS = ("sks", "ohwx", "zwx", "qrv", "bnk", "vxt", "style", "in the style of", "character", "photo", "beautiful")
CHARACTER_NAMES = ("pim", "zuki", "tok", "gloop")


def describe_figure(figure: Figure, rng: Rng, *, distance: str = "normal") -> str:
    """Size, color, pose and noun; every word but the noun is left out now and then."""
    size = choose(rng, DISTANCE_WORDS[distance]) if rng.random() < 0.7 else ""
    color = "" if rng.random() < 0.04 else figure.color
    pose = figure.pose if rng.random() < 0.6 else ""
    words = [size, pose, color, figure.subject]
    return "a " + " ".join(word for word in words if word)


def describe_figures(scene: Scene, rng: Rng) -> str:
    if len(scene.figures) == 1:
        figure = scene.figures[0]
        prop = PROP_WORDS.get(figure.prop, "")
        side = SIDE_WORDS[scene.side] if rng.random() < 0.45 else ""
        return join_words(describe_figure(figure, rng, distance=scene.distance), prop, side)
    first, second = (describe_figure(f, rng, distance=scene.distance) for f in scene.figures)
    if scene.relation == "in front of":
        if rng.random() < 0.3:
            return join_words(second, "behind", first)
        return join_words(first, "in front of", second)
    kind = rng.random()
    if kind < 0.25:
        return join_words(first, "to the left of", second)
    if kind < 0.5:
        return join_words(second, "to the right of", first)
    if rng.random() < 0.5:
        first, second = second, first
    return join_words(first, choose(rng, JOINTS), second)


def join_words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def write_caption(scene: Scene, rng: Rng, *, style: str = "flat") -> str:
    """One phrasing of the scene, drawn at random.

    Color, place, time or weather is left out now and then, so that short prompts work too; words without meaning appear
    now and then, so that they stay neutral and are free for an adapter's trigger.
    """
    hour = "" if rng.random() < 0.03 or scene.setting == "moon" else choose(rng, HOURS[scene.time])
    sky = "" if rng.random() < 0.03 else choose(rng, SKIES[scene.weather])
    season = choose(rng, SEASON_WORDS[scene.season]) if scene.setting in SEASONAL and rng.random() > 0.03 else ""
    subject = describe_figures(scene, rng)
    opening, tag = "", ""
    if style != "flat":
        opening, tag = STYLES[style]
        opening, tag = (opening, "") if rng.random() < 0.6 else ("", tag)
    if rng.random() < 0.15:
        parts = [subject, scene.setting if rng.random() > 0.05 else "", hour, sky, season, tag]
        text = opening + ", ".join(part for part in parts if part)
    else:
        place = "" if rng.random() < 0.05 else choose(rng, PLACES[scene.setting])
        text = (opening or choose(rng, OPENINGS)) + join_words(subject, place, hour, sky, season)
        text = f"{text}, {tag}" if tag else text
    if rng.random() < 0.05:
        stray = choose(rng, (*STRAY_WORDS, *CHARACTER_NAMES))
        text = f"{stray} {text}" if rng.random() < 0.5 else f"{text}, {stray}"
    return with_articles(text)


def with_articles(text: str) -> str:
    """Single blanks, and "an" before vowels."""
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(text.split()))


def plain_caption(scene: Scene, *, style: str = "flat") -> str:
    """The scene in the world's plainest words, all of them: for sample sets and measurements."""
    names = [f"a {join_words(figure.color, figure.subject)}" for figure in scene.figures]
    if len(scene.figures) == 2:
        subject = join_words(names[0], scene.relation.replace("beside", "and"), names[1])
    else:
        subject = join_words(names[0], PROP_WORDS.get(scene.figures[0].prop, ""))
    words = [PLACES[scene.setting][0], "" if scene.setting == "moon" else HOURS[scene.time][0], SKIES[scene.weather][0]]
    return with_articles(join_words(STYLES[style][0] + subject, *words, SEASON_WORDS[scene.season][0]))


def vocabulary() -> list[str]:
    """Every word that a caption may contain, and the comma."""
    phrases = [*OPENINGS, *STRAY_WORDS, *CHARACTER_NAMES, *SUBJECTS, *COLORS, *SETTINGS, *JOINTS, "a", "an", ","]
    phrases += [
        "to the left of",
        "to the right of",
        "in front of",
        "behind",
        *SIDE_WORDS.values(),
        *PROP_WORDS.values(),
    ]
    phrases += [pose for subject in SUBJECTS.values() for pose in subject.poses]
    for table in (PLACES, HOURS, SKIES, SEASON_WORDS, DISTANCE_WORDS, STYLES):
        phrases += [phrase for row in table.values() for phrase in row]
    phrases += ["ink", "watercolor", "pixel", "art", "stained", "glass", "blueprint", "paper", "the", "with", "without"]
    return sorted({word for phrase in phrases for word in phrase.replace(",", " , ").split()})
