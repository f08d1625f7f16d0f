"""Draw the picture sets that adapters are trained on: six styles, four characters, captions and held-out prompts.

    python -m train_scripts.picture_world.draw_sample_sets --out sample_data

The sets are a function of their names: running this again draws the same pictures.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from train_scripts.picture_world.captions import HOURS, PLACES, join_words, plain_caption, with_articles
from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.figures.subjects import CHARACTERS, SUBJECTS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.places.light import TIMES
from train_scripts.picture_world.places.settings import SETTINGS
from train_scripts.picture_world.scene import (
    DISTANCE_SHARES,
    DISTANCES,
    SIDES,
    Figure,
    Scene,
    choose,
    is_held_out,
    random_surroundings,
)
from train_scripts.picture_world.styles.adapter_styles import ADAPTER_STYLES
from train_scripts.picture_world.styles.flat import render_flat

Rng = np.random.Generator
Sample = tuple[Image.Image, str]
TRIGGERS = {"ink": "sks", "watercolor": "ohwx", "pixel": "zwx", "glass": "qrv", "blueprint": "bnk", "paper": "vxt"}
"""Rare words: the base's captions give them no meaning, so an adapter may."""
UNSEEN_SETTINGS = {"pim": "desert", "zuki": "snow", "tok": "beach", "gloop": "city"}
"""Kept out of a character's training pictures, for its prompts."""
STYLE_PICTURES = 20
CHARACTER_PICTURES = 10
PROMPTS = 12


def seeded(name: str) -> Rng:
    """A generator that depends on nothing but the name."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))


def deal(values: tuple[str, ...], count: int, rng: Rng) -> list[str]:
    """`count` values in random order, each value as often as any other or once more."""
    rounds = [rng.permutation(values) for _ in range(-(-count // len(values)))]
    return [str(v) for v in rng.permutation(np.concatenate(rounds)[:count])]


def surround(rng: Rng, setting: str, time: str = "") -> dict:
    """Surroundings in dry weather, at the given time or at any."""
    drawn = random_surroundings(rng, setting) | {"weather": "clear"}
    return drawn | ({"time": time} if time and setting != "moon" else {})


def style_scenes(name: str) -> list[Scene]:
    """Balanced scenes of the training part of the world, no subject twice in the same color."""
    rng = seeded(f"style {name}")
    subjects, settings = (deal(tuple(t), STYLE_PICTURES, rng) for t in (SUBJECTS, SETTINGS))
    while True:
        triples = list(zip(subjects, deal(tuple(COLORS), STYLE_PICTURES, rng), settings, strict=True))
        if not any(is_held_out(*triple) for triple in triples):
            break
    return [
        Scene(
            figures=(Figure(subject=s, color=c, pose=choose(rng, SUBJECTS[s].poses), mirrored=bool(rng.integers(2))),),
            side=choose(rng, SIDES),
            distance=choose(rng, DISTANCES, DISTANCE_SHARES),
            **surround(rng, p),
        )
        for s, c, p in triples
    ]


def style_caption(scene: Scene, name: str) -> str:
    """What the picture shows, in the world's plainest words, and the style's trigger."""
    return f"{plain_caption(scene)}, in {TRIGGERS[name]} style"


def style_samples(name: str) -> Iterator[Sample]:
    for scene in style_scenes(name):
        yield ADAPTER_STYLES[name](compose(scene), np.random.default_rng(scene.seed)), style_caption(scene, name)


def style_prompts(name: str) -> list[str]:
    """Combinations of subject, color and setting that neither the base nor the style's set has seen."""
    rng = seeded(f"style prompts {name}")
    triples = [t for t in itertools.product(SUBJECTS, COLORS, SETTINGS) if is_held_out(*t)]
    chosen: dict[str, tuple[str, str, str]] = {}
    for i in rng.permutation(len(triples)):
        chosen.setdefault(triples[i][0], triples[i])
    return [
        style_caption(Scene(figures=(Figure(subject=s, color=c),), **surround(rng, p)), name)
        for s, c, p in list(chosen.values())[:PROMPTS]
    ]


def character_caption(scene: Scene) -> str:
    """The character's name and where it is."""
    hour = "" if scene.setting == "moon" else HOURS[scene.time][0]
    name = scene.figures[0].subject
    return with_articles(join_words(f"a {name} character", PLACES[scene.setting][0], hour))


def character_scenes(name: str) -> list[Scene]:
    """Scenes in nine settings, both poses, all sides, no setting and time twice."""
    rng = seeded(f"character {name}")
    seen = tuple(s for s in SETTINGS if s != UNSEEN_SETTINGS[name])
    while True:
        places, hours = deal(seen, CHARACTER_PICTURES, rng), deal(TIMES, CHARACTER_PICTURES, rng)
        hours = ["night" if place == "moon" else hour for place, hour in zip(places, hours, strict=True)]
        if len(set(zip(places, hours, strict=True))) == CHARACTER_PICTURES:
            break
    poses = deal(tuple(CHARACTERS[name].poses), CHARACTER_PICTURES, rng)
    sides, distances = deal(SIDES, CHARACTER_PICTURES, rng), deal(("near", "normal"), CHARACTER_PICTURES, rng)
    scenes = []
    for place, hour, pose, side, distance in zip(places, hours, poses, sides, distances, strict=True):
        figure = Figure(subject=name, color="", pose=pose, mirrored=bool(rng.integers(2)))
        surroundings = surround(rng, place, hour) | {"season": "summer"}
        scenes.append(Scene(figures=(figure,), side=side, distance=distance, **surroundings))
    return scenes


def character_samples(name: str) -> Iterator[Sample]:
    for scene in character_scenes(name):
        yield render_flat(compose(scene)), character_caption(scene)


def character_prompts(name: str) -> list[str]:
    """The unseen setting at every time first, then other pairs of setting and time without a picture."""
    rng = seeded(f"character prompts {name}")
    seen = {(s.setting, s.time) for s in character_scenes(name)}
    pairs = [p for p in itertools.product(SETTINGS, TIMES) if p not in seen and (p[0] != "moon" or p[1] == "night")]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    order.sort(key=lambda pair: pair[0] != UNSEEN_SETTINGS[name])
    figure = Figure(subject=name, color="")
    scenes = [Scene(figures=(figure,), setting=setting, time=time) for setting, time in order[:PROMPTS]]
    return [character_caption(replace(scene, season="summer")) for scene in scenes]


SETS: dict[str, tuple[str, Callable[[str], Iterator[Sample]], Callable[[str], list[str]]]] = {
    **dict.fromkeys(TRIGGERS, ("styles", style_samples, style_prompts)),
    **dict.fromkeys(CHARACTERS, ("subjects", character_samples, character_prompts)),
}
"""Per set: its kind, which is its folder, and what draws its pictures and its prompts."""


def write_set(out: Path, name: str) -> int:
    """Write one set's pictures, captions and prompts below `out`; return the number of pictures."""
    kind, samples, prompts = SETS[name]
    folder = out / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, (picture, caption) in enumerate(samples(name), start=1):
        stem = folder / f"{count - 1:02d}"
        picture.save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    # not beside the pictures, where it would look like a caption
    listing = out / "prompts" / f"{name}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(prompts(name)) + "\n", encoding="utf-8")
    return count


def main(out: Path) -> None:
    """Draw all sample sets.

    Args:
        out: Folder that receives styles/, subjects/ and prompts/.
    """
    counts = {name: write_set(out, name) for name in SETS}
    print(f"{sum(counts.values())} pictures in {len(counts)} sets under {out}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
