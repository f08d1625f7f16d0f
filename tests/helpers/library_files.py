"""Adapter files in every dialect, small, for the tests of the library."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.safetensors import read_header
from lora_diffusion.library.entry import LibraryEntry
from lora_diffusion.library.search import Library

MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"


def factors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, 768, generator=rng), torch.randn(640, 1, generator=rng)


def native(path: Path, *, name: str = "", seed: int = 0, **more: Any) -> Path:
    """A file of ours with one layer for SD 1.x, and with what else is asked for."""
    down, up = factors(seed)
    adapter = Adapter(
        layers={f"unet.{MODULE}": LoRALayer(down=down, up=up, alpha=1.0)},
        metadata=AdapterMetadata(name=name, family="sd1", trigger_words=("sks",)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(replace(adapter, **more), path)
    return path


def kohya(path: Path, *, seed: int = 0, **entries: str) -> Path:
    """A file as kohya's trainer writes it."""
    down, up = factors(seed)
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.alpha": torch.tensor(1.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=entries)
    return path


def peft_folder(path: Path, *, alpha: float = 1.0) -> Path:
    down, up = factors(7)
    path.mkdir(parents=True)
    keys = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
    save_file(dict(zip(keys, (down, up), strict=True)), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": alpha}))
    return path


def payload_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()[read_header(path).data_start :]).hexdigest()


def file_hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def by_path(library: Library) -> dict[str, LibraryEntry]:
    return {entry.relative: entry for entry in library.entries}


def in_place(path: Path, data: bytes) -> None:
    """Other bytes in a file, of the same length and with the same time: nobody could know without reading it."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
