"""Training data against the base that they are for."""

from pathlib import Path
from typing import Any

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
    """Check a dataset for a base, whose weights are not read. Raises BaseModelError, DatasetError."""
    folder = find_base(base)
    with quiet_libraries():
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    sample_size = int(read_json(folder / "unet" / "config.json")["sample_size"])
    levels = len(read_json(folder / "vae" / "config.json")["block_out_channels"])
    return check_dataset(
        config,
        size_px=config.resolution or sample_size * 2 ** (levels - 1),
        count_chunks=lambda text: len(split_chunks(tokenizer, parse_literal(text))),
        trigger=trigger,
    )


def save_contact_sheet(report: DatasetReport, config: DataConfig, path: Path) -> None:
    """Write the contact sheet as PNG. Raises OutputError."""
    with atomic_file(path) as part:
        draw_contact_sheet(report, config).save(part, format="PNG")
