"""Writes `train_scripts/configs`: the settings of each base, purpose and size of GPU, spelled out to be changed.

    python -m train_scripts.write_configs

They are what `lora_diffusion/config/defaults.py` comes to, where the reasons are; a test holds them to it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from lora_diffusion.config.defaults import MEMORY, Purpose, default_settings, memory_settings, with_precision
from lora_diffusion.config.settings import deep_merge
from lora_diffusion.core.atomic_files import atomic_file

CONFIGS = Path(__file__).with_name("configs")
BASES = {
    "sd15": ("sd1", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": ("sd2", "stabilityai/stable-diffusion-2-1"),
    "sdxl": ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
}
TOLD: dict[Purpose, dict[str, Any]] = {
    "style": {"data": {"folder": "pictures"}, "output": "style.safetensors", "trigger_words": ["sks"]},
    "dreambooth": {
        "data": {"folder": "pictures", "instance_prompt": "photo of sks dog"},
        "output": "subject.safetensors",
        "prior": {"prompt": "photo of a dog"},
    },
}
"""What no default can know; paths are read from the file's own folder."""


def configs() -> Iterator[tuple[str, str]]:
    """Each file's name and text."""
    for purpose in get_args(Purpose):
        yield f"tiny-{purpose}.toml", text("tiny-sd", "tiny-sd", purpose, None)
        for short, (family, base) in BASES.items():
            for gigabytes in MEMORY:
                yield f"{short}-{purpose}-{gigabytes}gb.toml", text(family, base, purpose, gigabytes)


def text(family: str, base: str, purpose: Purpose, gigabytes: int | None) -> str:
    """One file: a comment on what it is for, then settings, sections last."""
    table = with_precision(default_settings(purpose, family), on_gpu=gigabytes is not None)
    table = deep_merge(table, memory_settings(family, gigabytes) if gigabytes else {})
    table = deep_merge({"base": base, **table}, TOLD[purpose])
    what = "A style" if purpose == "style" else "A subject"
    where = f"a GPU of {gigabytes} GB" if gigabytes else "the processor alone"
    return f"# {what} on {base}, with {where}. Written by `python -m train_scripts.write_configs`.\n{toml(table)}"


def toml(table: Mapping[str, Any]) -> str:
    """A table of plain values and of sections of them; numbers, texts and lists are written alike in JSON and TOML."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    sections = [f"\n[{key}]\n{toml(value)}" for key, value in table.items() if isinstance(value, Mapping)]
    return "\n".join([*plain, *(section.rstrip("\n") for section in sections)]) + "\n"


def main() -> None:
    CONFIGS.mkdir(exist_ok=True)
    for name, words in configs():
        with atomic_file(CONFIGS / name) as part:
            part.write_text(words, encoding="utf-8")


if __name__ == "__main__":
    main()
