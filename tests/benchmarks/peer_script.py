"""Run diffusers' example training script without torchvision and datasets.

    python -m tests.benchmarks.peer_script train_text_to_image_lora.py --train_data_dir pictures ...

torchvision cannot be combined with a CPU build of torch from another index, and the script needs only a small part of
both libraries: image folders with captions in .txt files, crops, and conversion to tensors. The replacements do less
work than the originals, so they make the script faster, if anything.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers.pipelines  # both look for torchvision as they are imported, and must not find what is below
import numpy as np
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from PIL import Image
from torch import Tensor


class InterpolationMode(Enum):
    LANCZOS = "lanczos"


def smaller_side(size: int, interpolation: InterpolationMode) -> Callable[[Image.Image], Image.Image]:
    del interpolation

    def resized(image: Image.Image) -> Image.Image:
        share = size / min(image.size)
        return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS)

    return resized


def center(size: int) -> Callable[[Image.Image], Image.Image]:
    def crop(image: Image.Image) -> Image.Image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    return crop


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def compose(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def through(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return through


def scaled(mean: list[float], spread: list[float]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (tensor - mean[0]) / spread[0]


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """An image folder in the form of a `datasets` dataset."""

    column_names = ("image", "text")

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))
        self.transform: Callable[[dict[str, list[Any]]], dict[str, Any]] | None = None

    def with_transform(self, transform: Callable[[dict[str, list[Any]]], dict[str, Any]]) -> "Pictures":
        self.transform = transform
        return self

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        assert self.transform
        row = self.transform({"image": [Image.open(path)], "text": [path.with_suffix(".txt").read_text()]})
        return {key: value[0] for key, value in row.items()}


def load_dataset(_kind: str, *, data_files: dict[str, str], cache_dir: str | None) -> dict[str, Pictures]:
    del cache_dir
    return {"train": Pictures(Path(data_files["train"]).parent)}


def stand_ins() -> dict[str, ModuleType]:
    """Return replacements for the two libraries, as modules."""
    vision, data = ModuleType("torchvision"), ModuleType("datasets")
    vision.transforms = SimpleNamespace(  # type: ignore[attr-defined]
        InterpolationMode=InterpolationMode,
        Resize=smaller_side,
        CenterCrop=center,
        RandomCrop=center,
        RandomHorizontalFlip=lambda: lambda image: image,
        Lambda=lambda call: call,
        ToTensor=lambda: to_tensor,
        Normalize=scaled,
        Compose=compose,
    )
    quiet = SimpleNamespace(set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None)
    data.load_dataset = load_dataset  # type: ignore[attr-defined]
    data.utils = SimpleNamespace(logging=quiet)  # type: ignore[attr-defined]
    return {"torchvision": vision, "datasets": data}


if __name__ == "__main__":
    diffusers.DiffusionPipeline, diffusers.StableDiffusionPipeline  # noqa: B018 (they are imported when asked for)
    sys.modules |= stand_ins()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
