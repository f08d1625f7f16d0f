"""Every public function of the formats that takes a path accepts a string, a `Path` and any other `os.PathLike`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion import formats
from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.reduce.shared_basis import AdapterPack, PackedAdapter
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.formats import safetensors
from lora_diffusion.formats.adapters import kohya, load, native, pack, pickle, textual_inversion
from lora_diffusion.formats.adapters.weighted import load_weighted_adapter
from lora_diffusion.formats.checkpoints import checkpoint, diffusers
from tests.helpers.path_arguments import SPELLINGS, functions_with_paths

MODULE = "unet.mid_block.attentions.0.proj_in"
BASE = sample_data_folder() / "tiny-sd"
UNET = BASE / "unet" / "diffusion_pytorch_model.safetensors"


def lora_adapter() -> Adapter:
    layer = LoRALayer(down=torch.ones(2, 48), up=torch.ones(48, 2), alpha=1.0)
    return Adapter(layers={MODULE: layer}, metadata=AdapterMetadata(name="x", family="tiny-sd"))


def embedding() -> Adapter:
    return Adapter(layers={}, tokens={"cat": {"text_encoder": torch.ones(2, 768)}}, metadata=AdapterMetadata())


def small_pack() -> AdapterPack:
    packed = PackedAdapter(cores={}, ranks={}, error=0.0, biases={MODULE: torch.ones(48)})
    return AdapterPack(modules={}, adapters={"x": packed})


WRITERS: dict[str, Callable[[Any], None]] = {
    "safetensors.write_safetensors": lambda path: safetensors.write_safetensors(path, {"a": torch.ones(1)}, {}),
    "adapters.native.save_adapter": lambda path: native.save_adapter(lora_adapter(), path),
    "adapters.kohya.save_kohya": lambda path: kohya.save_kohya(lora_adapter(), path),
    "adapters.textual_inversion.save_embedding": lambda path: textual_inversion.save_embedding(embedding(), path),
    "adapters.pack.save_pack": lambda path: pack.save_pack(small_pack(), path),
}


def readers(folder: Path) -> dict[str, tuple[Callable[[Any], Any], Path]]:
    """Each reading function, with a path that it can read."""
    adapter, packed, pickled = folder / "a.safetensors", folder / "pack.safetensors", folder / "a.pt"
    native.save_adapter(lora_adapter(), adapter)
    pack.save_pack(small_pack(), packed)
    torch.save({"a": torch.ones(2)}, pickled)
    header = safetensors.read_header(adapter)
    info = next(iter(header.tensors.values()))
    names = ["unet.conv_in.weight"]
    return {
        "safetensors.read_header": (safetensors.read_header, adapter),
        "safetensors.read_safetensors": (safetensors.read_safetensors, adapter),
        "safetensors.read_meta_tensors": (safetensors.read_meta_tensors, adapter),
        "safetensors.map_safetensors": (safetensors.map_safetensors, adapter),
        "safetensors.file_payload_hash": (safetensors.file_payload_hash, adapter),
        "safetensors.file_and_payload_hash": (safetensors.file_and_payload_hash, adapter),
        "safetensors.read_tensor": (lambda path: safetensors.read_tensor(path, info, header.data_start), adapter),
        "adapters.load.load_adapter": (load.load_adapter, adapter),
        "adapters.load.load_unchecked": (load.load_unchecked, adapter),
        "adapters.load.load_meta_adapter": (load.load_meta_adapter, adapter),
        "adapters.load.read_adapter": (lambda path: load.read_adapter(path, load.FULL_FILE, ()), adapter),
        "adapters.weighted.load_weighted_adapter": (lambda path: load_weighted_adapter(path, 1.0), adapter),
        "adapters.pack.list_packed_adapters": (pack.list_packed_adapters, packed),
        "adapters.pack.load_pack": (pack.load_pack, packed),
        "adapters.pickle.is_pickled": (pickle.is_pickled, pickled),
        "adapters.pickle.read_pickled": (pickle.read_pickled, pickled),
        "checkpoints.checkpoint.open_checkpoint": (checkpoint.open_checkpoint, BASE),
        "checkpoints.diffusers.read_json": (diffusers.read_json, BASE / "model_index.json"),
        "checkpoints.diffusers.check_is_stable_diffusion": (diffusers.check_is_stable_diffusion, BASE),
        "checkpoints.diffusers.list_components": (diffusers.list_components, BASE),
        "checkpoints.diffusers.text_encoder_names": (diffusers.text_encoder_names, BASE),
        "checkpoints.diffusers.read_layout": (diffusers.read_layout, BASE),
        "checkpoints.diffusers.weight_files": (lambda path: diffusers.weight_files(path, "unet"), BASE),
        "checkpoints.diffusers.read_base_header": (diffusers.read_base_header, UNET),
        "checkpoints.diffusers.find_parameters": (lambda path: diffusers.find_parameters(path, names), BASE),
        "checkpoints.diffusers.weight_variant": (diffusers.weight_variant, BASE),
        "checkpoints.diffusers.base_hash": (diffusers.base_hash, BASE),
    }


def test_every_public_path_parameter_accepts_strings_and_is_tested(tmp_path: Path) -> None:
    assert functions_with_paths(formats) == set(WRITERS) | set(readers(tmp_path))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", WRITERS)
def test_writers_accept_any_path(name: str, spelling: Callable[[Path], Any], tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "expected.safetensors")
    WRITERS[name](spelling(tmp_path / "found" / "expected.safetensors"))
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "found" / "expected.safetensors").read_bytes() == expected


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_readers_accept_any_path(spelling: Callable[[Path], Any], tmp_path: Path) -> None:
    for name, (read, path) in readers(tmp_path).items():
        assert repr(read(spelling(path))) == repr(read(path)), name


def test_an_error_names_the_path_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(load.AdapterFormatError, match=r"missing\.safetensors: no such file"):
        load.load_adapter(str(tmp_path / "missing.safetensors"))
