"""Files of packs: every adapter is restored, and damaged files are rejected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diffusion.adapters.adapter import Adapter, adapter_hash
from lora_diffusion.algebra.reduce.shared_basis import AdapterPack, share_bases, unpack_adapter
from lora_diffusion.core.dtypes import tensor_bytes
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.adapters.pack import PACK_KEY, check_not_pack, list_packed_adapters, load_pack, save_pack
from lora_diffusion.formats.safetensors import read_header, read_safetensors, write_safetensors
from tests.helpers.packs import CONV, QUERY, families, new_family, true_error


def stored_bytes(family: AdapterPack, name: str) -> dict[str, bytes]:
    """Return the raw bytes of one adapter's cores and of the bases it uses."""
    member = family.adapters[name]
    tensors = {f"{path} {factor}": x for path, core in member.cores.items() for factor, x in core.factors.items()}
    for path in member.cores:
        tensors |= {f"{path} left": family.modules[path].left, f"{path} right": family.modules[path].right}
    return {key: bytes(tensor_bytes(tensor)) for key, tensor in tensors.items()}


@settings(max_examples=10)
@given(families, st.integers(1, 12), st.sampled_from([torch.float32, torch.float16]))
def test_file_restores_every_adapter(
    tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Adapter], rank: int, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("packs") / "pack.safetensors"
    family = share_bases(adapters, rank, dtype)
    save_pack(family, path)
    assert list_packed_adapters(path) == tuple(adapters)
    whole = load_pack(path)
    for name, adapter in adapters.items():
        alone = load_pack(path, [name])
        assert list(alone.adapters) == [name]
        for read in (whole, alone):
            assert stored_bytes(read, name) == stored_bytes(family, name)
            assert unpack_adapter(read, name).metadata == adapter.metadata
            assert unpack_adapter(read, name).biases.keys() == adapter.biases.keys()
            assert unpack_adapter(read, name).tokens.keys() == adapter.tokens.keys()
            assert true_error(adapter, unpack_adapter(read, name)) == pytest.approx(
                family.adapters[name].error, abs=2e-6
            )
        assert alone.adapters[name].error == pytest.approx(family.adapters[name].error, abs=1e-12)
    last = list(adapters)[-1]
    assert torch.equal(unpack_adapter(whole, last).biases[CONV], adapters[last].biases[CONV])
    words = unpack_adapter(whole, last).tokens["<a.b>"]["text_encoder"]
    assert torch.equal(words, adapters[last].tokens["<a.b>"]["text_encoder"])


def test_adapter_with_only_a_token_can_be_packed(tmp_path: Path) -> None:
    adapters = new_family(3, (2,))
    adapters["word"] = Adapter(layers={}, tokens={"<w>": {"text_encoder": torch.ones(1, 16)}})
    save_pack(share_bases(adapters, 2), tmp_path / "pack.safetensors")
    back = unpack_adapter(load_pack(tmp_path / "pack.safetensors"), "word")
    assert adapter_hash(back) == adapter_hash(adapters["word"])


def test_loading_one_adapter_does_not_read_the_others(tmp_path: Path) -> None:
    """Invalid tensors of other adapters do not matter."""
    path = tmp_path / "pack.safetensors"
    save_pack(share_bases(new_family(4, (2, 3)), 4), path)
    expected = adapter_hash(unpack_adapter(load_pack(path), "file-1"))
    tensors, entries = read_safetensors(path)
    broken = {key: torch.zeros_like(x) if key.startswith("0.") else x for key, x in tensors.items()}
    write_safetensors(path, broken, entries)
    assert adapter_hash(unpack_adapter(load_pack(path, ["file-1"]), "file-1")) == expected
    with pytest.raises(AdapterFormatError, match=r"file-0: the record and the cores do not match; the file is damaged"):
        load_pack(path)


def test_packs_and_adapters_are_not_confused(tmp_path: Path) -> None:
    adapters = new_family(5, (2, 2))
    save_pack(share_bases(adapters, 2), tmp_path / "pack.safetensors")
    with pytest.raises(AdapterFormatError):
        load_adapter(tmp_path / "pack.safetensors")
    entries = read_header(tmp_path / "pack.safetensors").metadata
    with pytest.raises(AdapterFormatError, match=r"p: is a pack of 2 adapters .* `lora-diffusion library unpack`"):
        check_not_pack(entries, "p")
    save_adapter(adapters["file-0"], tmp_path / "plain.safetensors")
    check_not_pack(read_header(tmp_path / "plain.safetensors").metadata, "p")
    with pytest.raises(AdapterFormatError, match="is not a pack of adapters"):
        load_pack(tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match=r"none of its 2 adapters is named 'file-x'; did you mean 'file-[01]'"):
        load_pack(tmp_path / "pack.safetensors", ["file-x"])
    with pytest.raises(ConfigError, match="no adapter named 'file-x'"):
        unpack_adapter(load_pack(tmp_path / "pack.safetensors"), "file-x")


def without(key: str) -> Any:
    return lambda tensors, _: tensors.pop(key)


def cut(key: str) -> Any:
    return lambda tensors, _: tensors.update({key: tensors[key][:-1].clone()})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(f"left.{QUERY}"), f"no shared factors that fit {QUERY}"),
        (cut(f"left.{QUERY}"), f"no shared factors that fit {QUERY}"),
        (without("1.record"), "file-1: the record and the cores do not match"),
        (without("1.cores"), "file-1: the record and the cores do not match"),
        (cut("1.cores"), "file-1: the record and the cores do not match"),
        (cut("1.record"), "file-1: the record and the cores do not match"),
        (lambda _, entries: entries.update({PACK_KEY: "{}"}), "cannot be read"),
        (lambda _, entries: entries.update({PACK_KEY: "no"}), "cannot be read"),
    ],
)
def test_damaged_packs_are_rejected(tmp_path: Path, damage: Any, words: str) -> None:
    path = tmp_path / "pack.safetensors"
    save_pack(share_bases(new_family(6, (2, 2)), 3), path)
    tensors, entries = read_safetensors(path)
    damage(tensors, entries)
    write_safetensors(path, tensors, entries)
    with pytest.raises(AdapterFormatError, match=words):
        load_pack(path)
