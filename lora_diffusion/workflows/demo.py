"""The whole story on the embedded base: train a style, blend it with a subject, merge the blend, compare."""

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
from lora_diffusion.errors import OutputError
from lora_diffusion.evaluation.image_grid import draw_image_grid, save_grid
from lora_diffusion.evaluation.style_distance import list_style_images, style_distance
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.sampling import generate
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.training.train import train

MARKER = ".lora_diffusion_demo"
STYLE, SUBJECT = "neon", "gloop"
STYLE_WORDS = "in zwx style"
STYLE_STEPS = 450
"""Fewer than the ready adapter's, so that the whole demo stays under five minutes on two cores."""
PROMPTS = (
    "a yellow cat in the snow, {style}",
    "a green rocket on a beach, {style}",
    "a red house in the mountains at sunset, {style}",
    "a gloop character in a desert, {style}",
    "a gloop character in the city at night, {style}",
)
SUBJECT_ROWS = (3, 4)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One blend of the grid."""

    title: str
    blend: Blend


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The figures that the demo prints."""

    distances: dict[str, float]
    """Style distance of each column's pictures to the style's training pictures."""
    merged_exact: int
    """Largest pixel difference, 0..255, between the live blend and the checkpoint merged in float32."""
    merged_half: int
    """The same for the checkpoint in the base's own precision."""
    seconds: float


def run_demo(output: Path, *, steps: int, print_line: Callable[[str], None]) -> DemoResult:
    """Train, blend, merge and compare under `output`; an earlier demo there is replaced.

    Raises OutputError if something else is there.
    """
    started = time.perf_counter()
    clear_output(output)
    style_file = train_style(output, steps=steps, print_line=print_line)
    subject_file = sample_data_folder() / "adapters" / f"{SUBJECT}.safetensors"
    base = load_base()
    columns = make_columns(style_file, subject_file)
    print_line(f"Sampling {len(columns) * len(PROMPTS)} pictures ...")
    pictures = [[p.image for p in generate(base, sampling_settings(), column.blend)] for column in columns]
    sheet = draw_image_grid(
        list(zip(*pictures, strict=True)),
        columns=[c.title for c in columns],
        labels=[prompt.format(style=STYLE_WORDS) for prompt in PROMPTS],
    )
    save_grid(sheet, output / "grid.png")
    both = columns[-1]
    print_line("Merging the blend into the checkpoint and sampling it again ...")
    exact = merged_difference(base, both, output / "merged-float32", "float32", pictures[-1])
    half = merged_difference(base, both, output / "merged", "keep", pictures[-1])
    style_set = list_style_images(sample_data_folder() / "styles" / STYLE)
    distances = {c.title: style_distance(base, p, style_set) for c, p in zip(columns, pictures, strict=True)}
    result = DemoResult(
        distances=distances, merged_exact=exact, merged_half=half, seconds=time.perf_counter() - started
    )
    for line in format_summary(result, output, style_file, subject_file):
        print_line(line)
    return result


def clear_output(output: Path) -> None:
    """Make way for the demo; only a folder that an earlier demo marked as its own is emptied."""
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        if not (output / MARKER).is_file():
            raise OutputError(f"{output}: holds something that is not a demo's; remove it or give another --output")
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).write_text("made by `lora-diffusion demo`, which may replace this folder\n")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None


def train_style(output: Path, *, steps: int, print_line: Callable[[str], None]) -> Path:
    changes: dict[str, object] = {"output": output / f"{STYLE}.safetensors", "steps": steps or STYLE_STEPS}
    config = read_toml(sample_data_folder() / "configs" / f"{STYLE}.toml", TrainConfig, changes)
    print_line(f"Training the {STYLE} style for {config.steps} steps on {config.data.folder} ...")
    result = train(config)
    print_line(f"  loss {result.first_loss:.3f} -> {result.last_loss:.3f}, saved to {result.path}")
    return result.path


def make_columns(style_file: Path, subject_file: Path) -> list[Column]:
    style, subject = load_adapter(style_file), load_adapter(subject_file)

    def make_column(title: str, style_weight: float, subject_weight: float) -> Column:
        entries = (
            WeightedAdapter(adapter=style, weight=style_weight, path=style_file),
            WeightedAdapter(adapter=subject, weight=subject_weight, path=subject_file),
        )
        return Column(title=title, blend=Blend(entries=entries))

    return [
        make_column("base", 0.0, 0.0),
        make_column(f"{STYLE} 0.5", 0.5, 0.0),
        make_column(f"{STYLE} 1.0", 1.0, 0.0),
        make_column(f"{SUBJECT} 1.0", 0.0, 1.0),
        make_column(f"{STYLE} 0.6 + {SUBJECT} 0.8", 0.6, 0.8),
    ]


def sampling_settings() -> list[GenerateConfig]:
    return [GenerateConfig(prompt=p.format(style=STYLE_WORDS), seed=i) for i, p in enumerate(PROMPTS)]


def merged_difference(
    base: Base, column: Column, output: Path, dtype: WeightType, expected: Sequence[Image.Image]
) -> int:
    """Largest difference of any pixel between the live blend's pictures and the merged checkpoint's."""
    merge(base.name, column.blend, output, MergeConfig(precision=dtype))
    again = [p.image for p in generate(load_base(str(output)), sampling_settings())]
    pairs = zip(again, expected, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def format_summary(result: DemoResult, output: Path, style_file: Path, subject_file: Path) -> list[str]:
    """Summarize the results, where they are, and what to try next."""
    exact = "bit for bit the blend's" if result.merged_exact == 0 else f"off by up to {result.merged_exact} of 255"
    rows = [f"  {title:<26}{value:.3f}" for title, value in result.distances.items()]
    return [
        f"Distance to the {STYLE} training pictures (0 is the same style):",
        *rows,
        f"Merged in float32: the pictures are {exact}; in float16: off by up to {result.merged_half} of 255.",
        f"Took {result.seconds:.0f} s. Look at {output / 'grid.png'}; the merged checkpoint is {output / 'merged'}.",
        "Try next:",
        f"  lora-diffusion generate --prompt 'a gloop character on a beach, {STYLE_WORDS}' --adapter {style_file}:0.6 "
        f"--adapter {subject_file}:0.8",
        f"  lora-diffusion inspect {style_file}",
        f"  lora-diffusion generate --base {output / 'merged'} --prompt 'a gloop character in the snow'",
    ]
