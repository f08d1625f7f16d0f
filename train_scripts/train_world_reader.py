"""Train and measure the reader of the picture world.

    python -m train_scripts.train_world_reader --steps 900 --out sample_data/tiny-world-reader

It learns from renderings in every style, drawn as it goes, and from crude ones whose subject is spoilt: those are
to be read as `nothing`. One core needs about ten minutes.
"""

import json
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from train_scripts.tiny_world.characters import CHARACTERS
from train_scripts.tiny_world.reader import (
    HEADS,
    NOTHING,
    Reading,
    WorldReader,
    load_reader,
    machine,
    read,
    save_reader,
    scores,
)
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import Scene, compose, random_scene
from train_scripts.tiny_world.shapes import polygon
from train_scripts.tiny_world.spoilt import CRUDE, Draw, blurred, with_other_subject
from train_scripts.tiny_world.styles import STYLES
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS
from train_scripts.tiny_world.vae_pictures import to_tensor

Rng = np.random.Generator
NOTHING_SHARE = 0.25
STYLED_SHARE = 0.3
UNSEEN = {"ink": ("colour", "time"), "neon": ("time",)}
"""What a style does not show."""
IGNORED = -100  # what cross_entropy skips


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = Path("sample_data/tiny-world-reader")
    steps: int = 900
    batch: int = 48
    fresh: int = 20
    """Pictures drawn anew per step; the rest of the batch comes from the last `kept`."""
    kept: int = 6000
    lr: float = 4e-3
    threads: int = 1
    seed: int = 0
    test_count: int = 1000
    crude_count: int = 200


def any_scene(rng: Rng) -> Scene:
    """A scene of any combination, each subject and character equally often."""
    subject = str(rng.choice([*SUBJECTS, *CHARACTERS]))
    return replace(random_scene(rng, held_out=bool(rng.random() < 0.125)), subject=subject)


def any_style(rng: Rng) -> tuple[str, Draw]:
    """A style's name and a renderer that draws the same picture each time; mostly the world's own."""
    if rng.random() >= STYLED_SHARE:
        return "flat", flat
    name = str(rng.choice(list(STYLES)))
    seed = int(rng.integers(2**31))
    return name, lambda picture: STYLES[name](picture, np.random.default_rng(seed))


def example(rng: Rng) -> tuple[Image.Image, list[int]]:
    """A picture and its label's number for each head; a colour that cannot be told is `IGNORED`."""
    scene = any_scene(rng)
    labels = {name: words.index(getattr(scene, name)) for name, words in HEADS.items()}
    if scene.subject in CHARACTERS:
        labels["colour"] = IGNORED
    style, draw = any_style(rng)
    for head in UNSEEN.get(style, ()):
        labels[head] = IGNORED
    if rng.random() >= NOTHING_SHARE:
        return draw(compose(scene)), list(labels.values())
    kind = str(rng.choice(list(CRUDE)))
    labels |= {"subject": HEADS["subject"].index(NOTHING), "colour": IGNORED}
    return CRUDE[kind](scene, rng, draw), list(labels.values())


def augmented(picture: Image.Image, rng: Rng) -> Tensor:
    """(3, 64, 64) in -1..1: mirrored or not, with the slight blur, noise and drift of an autoencoder."""
    picture = ImageOps.mirror(picture) if rng.random() < 0.5 else picture
    pixels = to_tensor(blurred(picture, float(rng.uniform(0, 1))))
    gain = torch.from_numpy(rng.uniform(0.95, 1.05) * rng.uniform(0.98, 1.02, (3, 1, 1))).float()
    noise = torch.from_numpy(rng.standard_normal((3, 64, 64), dtype=np.float32))
    return ((pixels + 1) * gain - 1 + float(rng.uniform(0, 0.06)) * noise).clamp(-1, 1)


def train(config: Config) -> WorldReader:
    """AdamW under one cycle of the learning rate; progress as JSON lines."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng((23, config.seed))
    reader = WorldReader().to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps, pct_start=0.1)
    pool: deque[tuple[Image.Image, list[int]]] = deque((example(rng) for _ in range(96)), maxlen=config.kept)
    started, losses = time.time(), []
    for step in range(config.steps):
        pool.extend(example(rng) for _ in range(config.fresh))
        newest = range(len(pool) - config.fresh, len(pool))
        chosen = [*newest, *rng.integers(0, len(pool), config.batch - config.fresh)]
        pictures = torch.stack([augmented(pool[i][0], rng) for i in chosen])
        labels = torch.tensor([pool[i][1] for i in chosen])
        logits = reader(pictures.to(memory_format=torch.channels_last))
        loss = sum(functional.cross_entropy(v, labels[:, k]) for k, v in enumerate(logits.values()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            minutes = round((time.time() - started) / 60, 2)
            row = {"step": step + 1, "loss": round(float(np.mean(losses[-25:])), 4), "minutes": minutes}
            print(json.dumps(row), flush=True)
    return reader.eval()


def star(scene: Scene, rng: Rng, draw: Draw) -> Image.Image:
    """A spiky polygon; never trained on."""
    turns = np.linspace(0, 2 * np.pi, 13)[:-1]
    reach = rng.uniform(0.15, 0.5, 12)
    points = [(float(r * np.cos(t)), float(0.5 + r * np.sin(t))) for r, t in zip(reach, turns, strict=True)]
    return with_other_subject(scene, [polygon(points, COLOURS[scene.colour])], draw)


def crude_figures(readings: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """How often the spoilt subject is still named, called nothing, or any subject claimed with confidence."""
    named = [r.subject == s.subject for r, s in zip(readings, scenes, strict=True)]
    claimed = [r.subject != NOTHING and r.subject_probability > 0.8 for r in readings]
    shares = {
        "subject_accuracy": named,
        "nothing": [r.subject == NOTHING for r in readings],
        "claims_over_80": claimed,
    }
    return {name: round(float(np.mean(hits)), 3) for name, hits in shares.items()}


def style_figures(reader: WorldReader, rng: Rng, count: int) -> dict[str, dict]:
    """Accuracy on true renderings in each style; None for what the style does not show."""
    tables: dict[str, dict] = {}
    for name, draw in STYLES.items():
        scenes = [any_scene(rng) for _ in range(count)]
        readings = read(reader, [draw(compose(scene), rng) for scene in scenes])
        accuracies = {k: v["accuracy"] for k, v in scores(readings, scenes).items() if k != "all_three"}
        tables[name] = {k: None if k in UNSEEN.get(name, ()) else v for k, v in accuracies.items()}
    return tables


def degraded_figures(reader: WorldReader, rng: Rng, count: int) -> dict[str, dict]:
    """Accuracy and confidence as the whole picture is blurred or made noisy, by kind."""
    scenes = [any_scene(rng) for _ in range(count)]
    pictures = [flat(compose(scene)) for scene in scenes]
    changed = {f"blur {radius} px": [blurred(p, radius) for p in pictures] for radius in (0, 1, 2, 3, 5)}
    drifted = [augmented(p, rng) for p in pictures]
    tables: dict[str, dict] = {}
    for name, images in (changed | {"as an autoencoder": torch.stack(drifted)}).items():
        readings = read(reader, images)
        accuracies = {k: v["accuracy"] for k, v in scores(readings, scenes).items()}
        confidence = float(np.mean([r.subject_probability for r in readings]))
        nothing = float(np.mean([r.subject == NOTHING for r in readings]))
        tables[name] = accuracies | {"nothing": round(nothing, 3), "subject_confidence": round(confidence, 3)}
    return tables


def measure(reader: WorldReader, config: Config) -> dict[str, dict]:
    """All figures, on scenes that training did not draw."""
    rng = np.random.default_rng((29, config.seed))
    scenes = [any_scene(rng) for _ in range(config.test_count)]
    crude: dict[str, dict] = {}
    for name, spoil in (CRUDE | {"star": star}).items():
        spoilt = [any_scene(rng) for _ in range(config.crude_count)]
        crude[name] = crude_figures(read(reader, [spoil(s, rng, flat) for s in spoilt]), spoilt)
    return {
        "fresh": scores(read(reader, [flat(compose(s)) for s in scenes]), scenes),
        "styles": style_figures(reader, rng, config.crude_count),
        "degraded": degraded_figures(reader, rng, config.crude_count),
        "crude": crude,
    }


def table(rows: dict[str, dict], title: str) -> str:
    """A Markdown table of one row per entry."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {' | '.join([name, *(str(row[c]) for c in columns)])} |" for name, row in rows.items()]
    return "\n".join(lines)


CARD = """# Reader of the tiny world

A convolutional network of {parameters} parameters that reads subject, colour, setting and time of day off a
64 px picture of the world in `train_scripts/tiny_world`. It judges the embedded base and its adapters. Apart
from the world's subjects and characters it knows the subject `nothing`: a missing, blurred, scrambled, mixed
or blob-like subject. Colour has no meaning for `nothing` and for the characters.

Made by `python -m train_scripts.train_world_reader --steps {steps}` in {minutes} minutes of processor time on
{cpu} ({threads} thread, torch {torch}). All figures are on scenes that training did not draw.

## Plain renderings

{fresh}

## Styles

True renderings in the styles of `sample_data/styles`, which are among the training pictures. Ink has no colour and
shows no time of day, neon no time of day.

{styles}

## Degraded renderings

`as an autoencoder`: blur up to 1 px, noise up to 0.03 of the range, brightness within 5 %, as in training.

{degraded}

## Spoilt subjects

How often the original subject is still named, `nothing` is read, and a subject is claimed with a probability
above 0.8. `star` is not among the training pictures.

{crude}

## Limits

It knows the flat style and the three of the sample data: on others its readings are not to be trusted unmeasured. Its
probabilities are not calibrated. Where two subjects are halved and joined it often names one of them, see
`halves`. It does not read weather or size.
"""


def card(reader: WorldReader, figures: dict, config: Config) -> str:
    return CARD.format(
        parameters=sum(p.numel() for p in reader.parameters()),
        steps=config.steps,
        minutes=figures["cpu_minutes"],
        fresh=table(figures["fresh"], "read"),
        styles=table(figures["styles"], "style"),
        degraded=table(figures["degraded"], "picture"),
        crude=table(figures["crude"], "spoilt by"),
        **{k: figures["machine"][k] for k in ("cpu", "threads", "torch")},
    )


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(config.threads)
    started = time.process_time()
    save_reader(train(config), config.out)
    minutes = round((time.process_time() - started) / 60, 1)
    reader = load_reader(config.out)  # measured as stored, in float16
    figures = {"cpu_minutes": minutes, "machine": machine(), **measure(reader, config)}
    (config.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (config.out / "README.md").write_text(card(reader, figures, config))
    print(json.dumps({k: v["accuracy"] for k, v in figures["fresh"].items()} | {"cpu_minutes": minutes}))


if __name__ == "__main__":
    main()
