"""Prompts that ask for everything the reader can check, balanced over subjects and colours."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np

from train_scripts.tiny_world.captions import HOURS, OPENINGS, PLACES, SKIES
from train_scripts.tiny_world.scene import Scene, is_held_out, random_scene
from train_scripts.tiny_world.settings import SETTINGS
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrasing that names colour, subject, place, time and, unless it is clear, the weather."""
    size = scene.size if scene.size != "normal" else str(rng.choice(("", "", "little", "cute")))
    hours = [hour for hour in HOURS[scene.time] if hour]
    skies = [sky for sky in SKIES[scene.weather] if scene.time == "day" or not sky.endswith(" day")]
    if scene.weather != "clear" and "in the sunshine" in hours:
        hours.remove("in the sunshine")
    noun = " ".join(word for word in (size, scene.colour, scene.subject) if word)
    parts = [str(rng.choice(words)) for words in (PLACES[scene.setting], hours, skies)]
    text = f"{rng.choice(OPENINGS)}a {noun} " + " ".join(part for part in parts if part)
    return re.sub(r"\ba ([aeo])", r"an \1", text)


def balanced_scenes(count: int, rng: np.random.Generator, *, held_out: bool) -> list[Scene]:
    """Scenes of seen or held-out combinations: subjects in turn, each in the colour used least so far."""
    used: Counter[str] = Counter()
    scenes: list[Scene] = []
    for i in range(count):
        subject = list(SUBJECTS)[i % len(SUBJECTS)]
        free = [(c, s) for c in COLOURS for s in SETTINGS if is_held_out(subject, c, s) == held_out]
        fewest = min(used[c] for c, _ in free)
        choices = [pair for pair in free if used[pair[0]] == fewest]
        colour, setting = choices[int(rng.integers(len(choices)))]
        used[colour] += 1
        drawn = random_scene(rng, held_out=held_out)
        scenes.append(replace(drawn, subject=subject, colour=colour, setting=setting))
    return scenes


def asked_scenes(count: int, seed: int) -> list[tuple[Scene, str]]:
    """(scene, prompt) pairs, a seen and a held-out combination in turn."""
    rng = np.random.default_rng((17, seed))
    halves = [balanced_scenes(count // 2, rng, held_out=held_out) for held_out in (False, True)]
    return [(s, full_caption(s, rng)) for pair in zip(*halves, strict=True) for s in pair]
