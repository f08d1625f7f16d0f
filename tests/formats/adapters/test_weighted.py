"""`Blend.of` with paths of adapter files."""

import os
from pathlib import Path

import pytest
import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.safetensors import file_payload_hash

PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def named(name: str) -> Adapter:
    layer = LoRALayer(down=torch.full((2, 48), float(len(name))), up=torch.ones(48, 2), alpha=2.0)
    return Adapter(layers={PATH: layer}, metadata=AdapterMetadata(name=name, family="sd1"))


def test_blend_of_accepts_adapters_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FolderEntry(os.PathLike[str]):
        def __fspath__(self) -> str:
            return "gloop.safetensors"

    monkeypatch.chdir(tmp_path)
    for name in ("neon", "gloop", "zuki"):
        save_adapter(named(name), tmp_path / f"{name}.safetensors")
    zuki = named("zuki")
    blend = Blend.of({"neon.safetensors": 0.8, FolderEntry(): 0.5, zuki: 0.25})
    assert repr(blend) == "Blend(neon x 0.8, gloop x 0.5, zuki x 0.25)"
    neon, gloop, loaded = blend.entries
    assert neon.hash == named("neon").hash
    assert (neon.path, gloop.path, loaded.path) == (Path("neon.safetensors"), Path("gloop.safetensors"), None)
    assert neon.payload_hash == file_payload_hash(tmp_path / "neon.safetensors")
    assert loaded.adapter is zuki
    pairs = Blend.of([(tmp_path / "neon.safetensors", 1.0), (zuki, -1.0)])
    assert repr(pairs) == "Blend(neon x 1, zuki x -1)"


def test_blend_of_refuses_files_that_are_not_adapters(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(AdapterFormatError, match=r"text\.safetensors"):
        Blend.of({tmp_path / "text.safetensors": 1.0})
