"""A small network that reads off a 128 px picture of the world what it shows.

It has a name for a subject that is not one: malformed subjects are read as `malformed`, so that a crude picture counts
as wrong. `malformed.py` draws such pictures.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from train_scripts.picture_world.canvas import SIZE_PX
from train_scripts.picture_world.figures.subjects import CHARACTERS, SUBJECTS
from train_scripts.picture_world.palette import COLORS
from train_scripts.picture_world.places.light import TIMES
from train_scripts.picture_world.places.settings import SETTINGS
from train_scripts.picture_world.scene import SIDES
from train_scripts.picture_world.styles.adapter_styles import ADAPTER_STYLES
from train_scripts.picture_world.styles.known_styles import KNOWN_STYLES
from train_scripts.tiny_base.vae_pictures import to_tensor

MALFORMED_SUBJECT = "malformed"
NONE = "none"
STYLE_NAMES = ("flat", *KNOWN_STYLES, *ADAPTER_STYLES)
HEADS: dict[str, tuple[str, ...]] = {
    "subject": (*SUBJECTS, *CHARACTERS, MALFORMED_SUBJECT),
    "color": tuple(COLORS),
    "second_subject": (*SUBJECTS, *CHARACTERS, MALFORMED_SUBJECT, NONE),
    "second_color": tuple(COLORS),
    "setting": tuple(SETTINGS),
    "time": TIMES,
    "side": SIDES,
    "style": STYLE_NAMES,
}
"""Questions and their answers. Of two figures the first is the left one; `side` is where a single figure stands."""
CHANNELS = (24, 48, 96, 128, 160)
COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one picture shows, and how sure the reader is of each answer."""

    answers: dict[str, str]
    probabilities: dict[str, float]

    @property
    def count(self) -> int:
        """Number of figures that are drawn well enough to be named."""
        subjects = (self.answers["subject"], self.answers["second_subject"])
        return sum(name not in (MALFORMED_SUBJECT, NONE) for name in subjects)


def _convolve(inside: int, outside: int, stride: int) -> nn.Sequential:
    kernels = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(kernels, nn.BatchNorm2d(outside), nn.ReLU())


class PictureReader(nn.Module):
    """Stages of two convolutions, each halving the picture; columns of the last map stay apart, for left and right."""

    def __init__(self, heads: dict[str, Sequence[str]] | None = None, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.labels = {name: tuple(labels) for name, labels in (heads or HEADS).items()}
        self.channels = tuple(channels)
        self.stages = nn.ModuleList(
            nn.Sequential(_convolve(inside, outside, 2), _convolve(outside, outside, 1))
            for inside, outside in zip((3, *self.channels[:-1]), self.channels, strict=True)
        )
        width = self.channels[-1] * (2 + COLUMNS)
        self.trunk = nn.Sequential(nn.Linear(width, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(k)) for name, k in self.labels.items()})

    def feature_maps(self, pictures: Tensor) -> list[Tensor]:
        """Maps of all stages for (n, 3, 128, 128) pictures in -1..1."""
        maps = [pictures]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]

    def embed(self, last: Tensor) -> Tensor:
        """(n, 256) features of the last stage's map."""
        columns = functional.adaptive_max_pool2d(last, (1, COLUMNS)).flatten(1)
        return self.trunk(torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3)), columns], dim=1))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(n, 3, 128, 128) pictures in -1..1 to logits (n, labels) of each head."""
        embedded = self.embed(self.feature_maps(pictures)[-1])
        return {name: head(embedded) for name, head in self.heads.items()}


def save_reader(reader: PictureReader, folder: Path) -> None:
    """Write the weights in float16 and the labels of each head."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in reader.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    config = {"channels": reader.channels, "size_px": SIZE_PX, "heads": reader.labels}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_reader(folder: Path) -> PictureReader:
    """Load the reader in float32, ready to read."""
    config = json.loads((folder / "config.json").read_text())
    reader = PictureReader(config["heads"], config["channels"])
    reader.load_state_dict(load_file(folder / "model.safetensors"))
    return reader.eval()


def stack_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 128, 128) in -1..1; pictures of another size are resized."""
    side = (SIZE_PX, SIZE_PX)
    fitting = (p if p.size == side else p.resize(side, Image.Resampling.BICUBIC) for p in pictures)
    return torch.stack([to_tensor(p.convert("RGB")) for p in fitting])


@torch.no_grad()
def read_pictures(reader: PictureReader, pictures: Sequence[Image.Image] | Tensor, *, batch: int = 32) -> list[Reading]:
    """One reading per picture; a tensor is (n, 3, 128, 128) in -1..1."""
    readings: list[Reading] = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        logits = reader(part.float() if isinstance(part, Tensor) else stack_pictures(part))
        best = {name: functional.softmax(values, dim=1).max(dim=1) for name, values in logits.items()}
        for i in range(len(part)):
            answers = {name: reader.labels[name][int(b.indices[i])] for name, b in best.items()}
            readings.append(
                Reading(answers=answers, probabilities={name: float(b.values[i]) for name, b in best.items()})
            )
    return readings
