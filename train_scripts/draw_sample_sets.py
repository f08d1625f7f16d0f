"""Draws the picture sets under sample_data: four styles, two characters, captions and held-out prompts.

The sets are a function of their names: running this again writes the same pictures.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from train_scripts.tiny_world.captions import HOURS, PLACES, SKIES
from train_scripts.tiny_world.characters import CHARACTERS
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import TIMES, Scene, compose, is_held_out
from train_scripts.tiny_world.settings import SETTINGS
from train_scripts.tiny_world.styles import STYLES
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS

STYLE_PICTURES = 20
PROMPTS = 8
TRIGGERS = {"ink": "sks", "watercolour": "ohwx", "neon": "zwx"}
"""Rare words: the base's captions give them no meaning, so an adapter may."""
STYLE_TIMES = ("day",) * 10 + ("sunset",) * 5 + ("night",) * 5
STYLE_WEATHERS = ("clear",) * 14 + ("cloudy",) * 4 + ("rain",) * 2
SUBJECT_TIMES = ("day", "day", "day", "day", "day", "sunset", "sunset", "night")
SUBJECT_SIZES = ("normal", "big")
UNSEEN_SETTINGS = {"gloop": "desert", "zuki": "snow"}
"""Kept out of a character's training pictures, for its prompts."""

Sample = tuple[Image.Image, str]


def seeded(name: str) -> np.random.Generator:
    """A generator that depends on nothing but the name."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))


def dealt(values: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    """`count` values in random order, each value as often as any other (or once more)."""
    rounds = [rng.permutation(values) for _ in range(-(-count // len(values)))]
    return [str(v) for v in rng.permutation(np.concatenate(rounds)[:count])]


def style_scenes(name: str) -> list[Scene]:
    """Balanced scenes of the training part of the world, no subject twice in the same colour."""
    rng = seeded(f"style {name}")
    subjects, settings = (dealt(tuple(t), STYLE_PICTURES, rng) for t in (SUBJECTS, SETTINGS))
    while True:
        triples = list(zip(subjects, dealt(tuple(COLOURS), STYLE_PICTURES, rng), settings, strict=True))
        pairs = {(subject, colour) for subject, colour, _ in triples}
        if len(pairs) == STYLE_PICTURES and not any(is_held_out(*t) for t in triples):
            break
    times, weathers = (rng.permutation(v) for v in (STYLE_TIMES, STYLE_WEATHERS))
    return [
        Scene(subject=s, colour=c, setting=p, time=str(t), weather=str(w), seed=int(rng.integers(2**31)))
        for (s, c, p), t, w in zip(triples, times, weathers, strict=True)
    ]


def words(text: str) -> str:
    """The text with single blanks and the right article."""
    return re.sub(r"\ba ([aeo])", r"an \1", " ".join(text.split()))


def style_caption(scene: Scene, name: str) -> str:
    """What the picture shows, in the world's plainest words, and the style's trigger."""
    where = f"{PLACES[scene.setting][0]} {HOURS[scene.time][0]} {SKIES[scene.weather][0]}"
    return f"{words(f'a {scene.colour} {scene.subject} {where}')}, in {TRIGGERS[name]} style"


def subject_caption(scene: Scene) -> str:
    """The character's name and where it is."""
    return words(f"a {scene.subject} character {PLACES[scene.setting][0]} {HOURS[scene.time][0]}")


def style_samples(name: str) -> Iterator[Sample]:
    for scene in style_scenes(name):
        picture = STYLES[name](compose(scene), np.random.default_rng(scene.seed))
        yield picture, style_caption(scene, name)


def style_prompts(name: str) -> list[str]:
    """Combinations of subject, colour and setting that neither the base nor the style's set has seen."""
    rng = seeded(f"style prompts {name}")
    triples = [t for t in itertools.product(SUBJECTS, COLOURS, SETTINGS) if is_held_out(*t)]
    chosen: dict[str, tuple[str, str, str]] = {}
    for i in rng.permutation(len(triples)):
        chosen.setdefault(triples[i][0], triples[i])
    scenes = [
        Scene(subject=s, colour=c, setting=p, time=str(rng.choice(TIMES, p=(0.5, 0.25, 0.25))))
        for s, c, p in list(chosen.values())[:PROMPTS]
    ]
    return [style_caption(scene, name) for scene in scenes]


def character_scene(name: str, setting: str, time: str, *, size: str = "normal", seed: int = 0) -> Scene:
    return Scene(subject=name, colour="", setting=setting, time=time, size=size, seed=seed)


def subject_scenes(name: str) -> list[Scene]:
    """Eight scenes in six settings, no setting and time twice."""
    rng = seeded(f"subject {name}")
    seen = tuple(s for s in SETTINGS if s != UNSEEN_SETTINGS[name])
    while True:
        places = dealt(seen, len(SUBJECT_TIMES), rng)
        if len(set(zip(places, SUBJECT_TIMES, strict=True))) == len(SUBJECT_TIMES):
            break
    return [
        character_scene(name, place, time, size=SUBJECT_SIZES[i % 2], seed=int(rng.integers(2**31)))
        for i, (place, time) in enumerate(zip(places, SUBJECT_TIMES, strict=True))
    ]


def subject_samples(name: str) -> Iterator[Sample]:
    for scene in subject_scenes(name):
        yield flat(compose(scene)), subject_caption(scene)


def subject_prompts(name: str) -> list[str]:
    """The unseen setting at every time first, then other pairs of setting and time without a picture."""
    rng = seeded(f"subject prompts {name}")
    seen = {(s.setting, s.time) for s in subject_scenes(name)}
    pairs = [p for p in itertools.product(SETTINGS, TIMES) if p not in seen]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    order.sort(key=lambda pair: pair[0] != UNSEEN_SETTINGS[name])
    return [subject_caption(character_scene(name, *pair)) for pair in order[:PROMPTS]]


SETS: dict[str, tuple[str, Callable[[str], Iterator[Sample]], Callable[[str], list[str]]]] = {
    **dict.fromkeys(TRIGGERS, ("styles", style_samples, style_prompts)),
    **dict.fromkeys(CHARACTERS, ("subjects", subject_samples, subject_prompts)),
}
"""Per set: its kind, which is its folder, and what draws its pictures and its prompts."""


def write_set(out: Path, name: str) -> int:
    """Write one set's pictures, captions and prompts below `out`; returns the number of pictures."""
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


def main(out: Path = Path("sample_data")) -> None:
    """Draw all sample sets.

    Args:
        out: Folder that receives styles/, subjects/ and prompts/.
    """
    counts = {name: write_set(out, name) for name in SETS}
    print(f"{sum(counts.values())} pictures in {len(counts)} sets under {out}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
