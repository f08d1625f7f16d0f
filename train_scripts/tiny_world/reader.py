"""A small network that reads off a 64 px picture of the world what it shows, and how readings are scored.

It has a name for a subject that is not one: pictures whose subject is a blob, a smear or missing are read as
`NOTHING`, so that a crude picture counts as wrong. `spoilt.py` draws such pictures.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from train_scripts.tiny_world.characters import CHARACTERS
from train_scripts.tiny_world.render import SIZE_PX
from train_scripts.tiny_world.scene import TIMES, Scene
from train_scripts.tiny_world.settings import SETTINGS
from train_scripts.tiny_world.subjects import COLOURS, SUBJECTS
from train_scripts.tiny_world.vae_pictures import to_tensor

NOTHING = "nothing"
HEADS: dict[str, tuple[str, ...]] = {
    "subject": (*SUBJECTS, *CHARACTERS, NOTHING),
    "colour": tuple(COLOURS),
    "setting": tuple(SETTINGS),
    "time": TIMES,
}
CHANNELS = (24, 64, 96)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one picture shows, each with its probability.

    `colour` has no meaning where `subject` is `NOTHING` or a character, which has colours of its own.
    """

    subject: str
    colour: str
    setting: str
    time: str
    subject_probability: float
    colour_probability: float
    setting_probability: float
    time_probability: float


class WorldReader(nn.Module):
    """Stages of two convolutions, each halving the picture, and a linear head per question.

    One more convolution at the end widens the view to 59 px, so that a subject is seen as a whole.
    """

    def __init__(self, heads: dict[str, Sequence[str]] | None = None, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.labels = {name: tuple(labels) for name, labels in (heads or HEADS).items()}
        self.channels = tuple(channels)
        pairs = zip((3, *self.channels[:-1]), self.channels, strict=True)
        halving = [layer for inside, outside in pairs for layer in stage(inside, outside)]
        self.body = nn.Sequential(*halving, *convolution(self.channels[-1], self.channels[-1], stride=1))
        width = 2 * self.channels[-1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(k)) for name, k in self.labels.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(n, 3, 64, 64) in -1..1 to logits (n, labels) of each head."""
        maps = self.body(pictures)
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


def convolution(inside: int, outside: int, *, stride: int) -> list[nn.Module]:
    kernels = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return [kernels, nn.BatchNorm2d(outside), nn.ReLU()]


def stage(inside: int, outside: int) -> list[nn.Module]:
    """Layers from (n, inside, s, s) to (n, outside, s / 2, s / 2)."""
    return [*convolution(inside, outside, stride=2), *convolution(outside, outside, stride=1)]


def save_reader(reader: WorldReader, folder: Path) -> None:
    """Weights in float16 and the labels of each head."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: (v.half() if v.is_floating_point() else v) for k, v in reader.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = {"channels": reader.channels, "size_px": SIZE_PX, "heads": reader.labels}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_reader(folder: Path) -> WorldReader:
    """The reader in float32, ready to read."""
    config = json.loads((folder / "config.json").read_text())
    reader = WorldReader(config["heads"], config["channels"])
    reader.load_state_dict(load_file(folder / "model.safetensors"))
    return reader.eval()


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 64, 64) in -1..1; pictures of another size are averaged or interpolated to 64 px."""
    side = (SIZE_PX, SIZE_PX)
    fitting = (p if p.size == side else p.resize(side, Image.Resampling.BICUBIC) for p in pictures)
    return torch.stack([to_tensor(p.convert("RGB")) for p in fitting])


@torch.no_grad()
def read(reader: WorldReader, pictures: Sequence[Image.Image] | Tensor, *, batch: int = 64) -> list[Reading]:
    """One reading per picture; a tensor is (n, 3, 64, 64) in -1..1."""
    readings: list[Reading] = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        logits = reader(part.float() if isinstance(part, Tensor) else stacked(part))
        best = {name: functional.softmax(values, dim=1).max(dim=1) for name, values in logits.items()}
        for i in range(len(part)):
            words = {name: reader.labels[name][int(best[name].indices[i])] for name in HEADS}
            chances = {f"{name}_probability": float(best[name].values[i]) for name in HEADS}
            readings.append(Reading(**words, **chances))
    return readings


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion, in 0..1."""
    if count == 0:
        return 0.0, 1.0
    z, share = 1.96, right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def proportion(hits: Sequence[bool]) -> dict[str, float | int | list[float]]:
    """Share of hits with its count and 95 % interval."""
    share = sum(hits) / max(1, len(hits))
    interval = [round(bound, 4) for bound in wilson(sum(hits), len(hits))]
    return {"accuracy": round(share, 4), "right": sum(hits), "count": len(hits), "interval95": interval}


def scores(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, dict]:
    """How often each word is read as the scene has it, and subject, colour and setting all at once.

    A character has no colour to be right about: it is left out of `colour`, and in `all_three` counts by the
    rest.
    """
    pairs = list(zip(readings, scenes, strict=True))
    hits = {name: [getattr(r, name) == getattr(s, name) for r, s in pairs] for name in HEADS}
    coloured = [s.subject not in CHARACTERS for s in scenes]
    rows = zip(hits["subject"], hits["colour"], hits["setting"], coloured, strict=True)
    hits["all_three"] = [subject and setting and (colour or not has) for subject, colour, setting, has in rows]
    hits["colour"] = [hit for hit, has in zip(hits["colour"], coloured, strict=True) if has]
    return {name: proportion(values) for name, values in hits.items()}


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
