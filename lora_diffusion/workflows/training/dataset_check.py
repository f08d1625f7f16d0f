"""Checks of training data for a base."""

import os
from pathlib import Path
from typing import Any, cast

from transformers import CLIPTokenizer

from lora_diffusion.config.train import DataConfig
from lora_diffusion.core.atomic_files import atomic_file
from lora_diffusion.data.checks import DatasetReport, check_dataset
from lora_diffusion.data.contact_sheet import draw_contact_sheet
from lora_diffusion.formats.checkpoints.diffusers import read_json
from lora_diffusion.models.load import quiet_libraries
from lora_diffusion.models.locate import find_base
from lora_diffusion.models.text_encoding import split_chunks
from lora_diffusion.prompts.emphasis import parse_literal


def check_dataset_for_base(config: DataConfig, base: str, trigger: str = "") -> DatasetReport:
    """Check a dataset with the tokenizer and the resolution of a base, whose weights are not read.

    Args:
        config: Settings of the dataset.
        base: `tiny-sd`, a diffusers folder or a hub id.
        trigger: Text that captions are expected to contain; empty to expect none.

    Raises:
        BaseModelError: If the base is not found, or its configuration cannot be read.
        DatasetError: If the folder, a picture or a caption cannot be read.
    """
    folder = find_base(base)
    with quiet_libraries():
        tokenizer: Any = cast(Any, CLIPTokenizer).from_pretrained(folder / "tokenizer")
    sample_size = int(read_json(folder / "unet" / "config.json")["sample_size"])
    levels = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
    return check_dataset(
        config,
        size_px=config.resolution or sample_size * 2 ** (levels - 1),
        count_chunks=lambda text: len(split_chunks(tokenizer, parse_literal(text))),
        trigger=trigger,
    )


def save_contact_sheet(report: DatasetReport, config: DataConfig, path: str | os.PathLike[str]) -> None:
    """Write a contact sheet of the pictures as they are cropped for training, as PNG.

    Raises:
        OutputError: If the file cannot be written.
    """
    with atomic_file(Path(path)) as part:
        draw_contact_sheet(report, config).save(part, format="PNG")
