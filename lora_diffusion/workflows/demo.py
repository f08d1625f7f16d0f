"""The demo on the embedded base: train a style, blend it with a subject, merge the blend, compare the images."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.merge import MergeConfig, WeightType
from lora_diffusion.config.settings import read_toml
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import OutputError
from lora_diffusion.evaluation.image_grid import draw_image_grid, save_grid
from lora_diffusion.evaluation.style_distance import list_style_images, style_distance
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.training.train import train

_MARKER = ".lora_diffusion_demo"
_STYLE, _SUBJECT = "neon", "gloop"
STYLE_WORDS = "in zwx style"
_STYLE_STEPS = 450
"""Training steps; fewer than those of the adapter in the sample data, so that the demo takes five minutes."""
PROMPTS = (
    "a yellow cat in the snow, {style}",
    "a green rocket on a beach, {style}",
    "a red house in the mountains at sunset, {style}",
    "a gloop character in a desert, {style}",
    "a gloop character in the city at night, {style}",
)
"""Prompts of the rows of the grid."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the grid."""

    title: str
    """Title above the column."""
    blend: Blend
    """The adapters of its images."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Measurements of the demo."""

    distances: dict[str, float]
    """Style distance of each column's images to the training pictures of the style."""
    merged_exact: int
    """Largest pixel difference, 0..255, between the live blend and the checkpoint merged in float32."""
    merged_half: int
    """Largest pixel difference, 0..255, between the live blend and the checkpoint merged in the base's precision."""
    seconds: float
    """Duration of the demo."""


def run_demo(output: str | os.PathLike[str], *, steps: int, print_line: Callable[[str], None]) -> DemoResult:
    """Train a style, blend it with a subject, merge the blend, and compare the images.

    Args:
        output: Folder to write to. The result of an earlier demo is replaced.
        steps: Training steps of the style; 0 for the default.
        print_line: Called with each line of text to show.

    Raises:
        OutputError: If the folder contains other files or cannot be written.
    """
    started, output = time.perf_counter(), Path(output)
    _clear_output(output)
    style_file = _train_style(output, steps=steps, print_line=print_line)
    subject_file = sample_data_folder() / "adapters" / f"{_SUBJECT}.safetensors"
    base = load_base()
    columns = _make_columns(style_file, subject_file)
    print_line(f"Sampling {len(columns) * len(PROMPTS)} pictures ...")
    pictures = [[p.image for p in generate(base, _make_settings(), column.blend)] for column in columns]
    sheet = draw_image_grid(
        list(zip(*pictures, strict=True)),
        columns=[c.title for c in columns],
        labels=[prompt.format(style=STYLE_WORDS) for prompt in PROMPTS],
    )
    save_grid(sheet, output / "grid.png")
    print_line("Merging the blend into the checkpoint and sampling it again ...")
    exact = _measure_merge(base, columns[-1].blend, output / "merged-float32", "float32", pictures[-1])
    half = _measure_merge(base, columns[-1].blend, output / "merged", "keep", pictures[-1])
    style_set = list_style_images(sample_data_folder() / "styles" / _STYLE)
    distances = {c.title: style_distance(base, p, style_set) for c, p in zip(columns, pictures, strict=True)}
    result = DemoResult(
        distances=distances, merged_exact=exact, merged_half=half, seconds=time.perf_counter() - started
    )
    for line in _format_summary(result, output, style_file, subject_file):
        print_line(line)
    return result


def _clear_output(output: Path) -> None:
    """Create the output folder, and delete an earlier demo in it, which is recognized by its marker file."""
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        if not (output / _MARKER).is_file():
            raise OutputError(f"{output}: contains files that no demo wrote; remove them or give another --output")
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / _MARKER).write_text("written by `lora-diffusion demo`, which may replace this folder\n")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None


def _train_style(output: Path, *, steps: int, print_line: Callable[[str], None]) -> Path:
    """Train the style and return the path of its adapter."""
    changes: dict[str, object] = {"output": output / f"{_STYLE}.safetensors", "steps": steps or _STYLE_STEPS}
    config = read_toml(sample_data_folder() / "configs" / f"{_STYLE}.toml", TrainConfig, changes)
    print_line(f"Training the {_STYLE} style for {config.steps} steps on {config.data.folder} ...")
    result = train(config)
    print_line(f"  loss {result.first_loss:.3f} -> {result.last_loss:.3f}, saved to {result.path}")
    return result.path


def _make_columns(style_file: Path, subject_file: Path) -> list[Column]:
    """Return the columns of the grid; the last one blends style and subject."""
    style, subject = load_adapter(style_file), load_adapter(subject_file)

    def make_column(title: str, style_weight: float, subject_weight: float) -> Column:
        entries = (
            WeightedAdapter(adapter=style, weight=style_weight, path=style_file),
            WeightedAdapter(adapter=subject, weight=subject_weight, path=subject_file),
        )
        return Column(title=title, blend=Blend(entries=entries))

    return [
        make_column("base", 0.0, 0.0),
        make_column(f"{_STYLE} 0.5", 0.5, 0.0),
        make_column(f"{_STYLE} 1.0", 1.0, 0.0),
        make_column(f"{_SUBJECT} 1.0", 0.0, 1.0),
        make_column(f"{_STYLE} 0.6 + {_SUBJECT} 0.8", 0.6, 0.8),
    ]


def _make_settings() -> list[GenerateConfig]:
    """Return the sampling settings of each prompt."""
    return [GenerateConfig(prompt=p.format(style=STYLE_WORDS), seed=i) for i, p in enumerate(PROMPTS)]


def _measure_merge(base: Base, blend: Blend, output: Path, dtype: WeightType, expected: Sequence[Image.Image]) -> int:
    """Merge a blend, and return the largest pixel difference between its images and those of the live blend."""
    merge(base.name, blend, output, MergeConfig(precision=dtype))
    merged = [p.image for p in generate(load_base(str(output)), _make_settings())]
    pairs = zip(merged, expected, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def _format_summary(result: DemoResult, output: Path, style_file: Path, subject_file: Path) -> list[str]:
    """Format the results, the paths of the files, and commands to try next."""
    exact = "identical" if result.merged_exact == 0 else f"different by up to {result.merged_exact} of 255"
    rows = [(f"  {title}", f"{value:.3f}") for title, value in result.distances.items()]
    return [
        f"Distance to the {_STYLE} training pictures (0 is the same style):",
        format_table([], rows),
        f"Pixels of the merged checkpoint and of the blend: in float32 {exact}; in float16 different by up to "
        f"{result.merged_half} of 255.",
        f"Took {result.seconds:.0f} s. The images are in {output / 'grid.png'}, the merged checkpoint in "
        f"{output / 'merged'}.",
        "Try next:",
        f"  lora-diffusion generate --prompt 'a gloop character on a beach, {STYLE_WORDS}' --adapter {style_file}:0.6 "
        f"--adapter {subject_file}:0.8",
        f"  lora-diffusion inspect {style_file}",
        f"  lora-diffusion generate --base {output / 'merged'} --prompt 'a gloop character in the snow'",
    ]
