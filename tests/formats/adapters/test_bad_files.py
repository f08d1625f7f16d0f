"""Damaged and hostile files raise one typed error, in bounded memory and time, also after random mutations."""

import json
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.kohya import save_kohya
from lora_diffusion.formats.adapters.load import load_adapter, load_meta_adapter
from lora_diffusion.formats.adapters.native import save_adapter

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
MUTATIONS = 2_000


def container(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has only 0 bytes"),
    "shorter than a length": (b"\1\2\3", "it has only 3 bytes"),
    "header longer than the file": (container({"a": entry()})[:20], "the header length is"),
    "ten gigabytes of header": ((10 * 2**30).to_bytes(8, "little") + b"{}", "the header length is 10,737,418,240"),
    "no JSON": (container(b"{not json"), "is not valid JSON"),
    "no UTF-8": (container(b"\xff\xfe{}"), "is not valid JSON"),
    "nested without end": (container(b"[" * 100_000), "is not valid JSON"),
    "a list": (container([1, 2]), "not a JSON object"),
    "duplicate keys": (
        container(b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"a":1}'),
        "duplicate key 'a'",
    ),
    "metadata of numbers": (container({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__"),
    "no dtype": (container({"a": {"shape": [1]}}), "'a' has no dtype"),
    "unknown dtype": (container({"a": entry(dtype="F7")}), "'a' has unknown dtype 'F7'"),
    "negative size": (container({"a": entry(shape=[-2, -2])}), "'a' has an invalid shape"),
    "size as text": (container({"a": entry(shape=["2", 2])}), "'a' has an invalid shape"),
    "offsets backwards": (container({"a": entry(offsets=[16, 0])}), "'a' of shape"),
    "offsets out of range": (container({"a": entry(shape=[4, 2], offsets=[0, 32])}), "'a' ends 16 bytes past"),
    "overlap": (container({"a": entry(), "b": entry(offsets=[0, 16])}), "'b' overlaps"),
    "gap": (container({"a": entry(shape=[1], offsets=[4, 8])}), "'a' leaves a gap"),
    "trailing bytes": (container({"a": entry()}, b"\0" * 20), "4 bytes after the last tensor"),
    "a pickle": (pickle.dumps({"a": 1}), "not a safetensors file"),
    "no tensors": (container({}, b""), "it holds no tensors"),
    "a length of two to the sixtieth": (b"\0" * 7 + b"\x10" + b"{}", "the header length is"),
}


@pytest.mark.parametrize("read", [load_adapter, load_meta_adapter])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_container_is_one_typed_error(case: str, read: Callable[[Path], Adapter], tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(AdapterFormatError) as caught:
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert peak < 20_000_000


FACTORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "up without down": ({UP: torch.ones(48, 2)}, "missing: down"),
    "rank 0": ({UP: torch.ones(48, 0), DOWN: torch.ones(0, 48)}, "is empty"),
    "ranks that differ": ({UP: torch.ones(48, 2), DOWN: torch.ones(3, 48)}, "invalid factor shapes"),
    "integers": ({UP: torch.ones(48, 2).int(), DOWN: torch.ones(2, 48).int()}, "floating point"),
    "NaN": ({UP: torch.full((48, 2), float("nan")), DOWN: torch.ones(2, 48)}, "hold NaN"),
    "infinity": ({UP: torch.full((48, 2), float("inf")), DOWN: torch.ones(2, 48)}, "hold NaN or infinity"),
    "an alpha of NaN": (
        {UP: torch.ones(48, 2), DOWN: torch.ones(2, 48), f"{NAME}.alpha": torch.tensor(float("nan"))},
        "alpha is nan",
    ),
    "an alpha of many": (
        {UP: torch.ones(48, 2), DOWN: torch.ones(2, 48), f"{NAME}.alpha": torch.ones(2)},
        "expected one number",
    ),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_make_no_layer_are_named(case: str, tmp_path: Path) -> None:
    tensors, words = FACTORS[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterFormatError, match=words) as caught:
        load_adapter(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{NAME}.oft_blocks", "OFT"),
        (f"{NAME}.a1.weight", "GLoRA"),
        (f"{NAME}.on_input", r"\(IA\)3"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha", "Stable Diffusion 3"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "transformer model"),
        ("model.diffusion_model.input_blocks.0.0.weight", "full checkpoint"),
        ("down_blocks.0.motion_modules.0.temporal.weight", "AnimateDiff"),
        ("what.is.this", "none of its 1 keys is in a known format"),
    ],
)
def test_other_kinds_and_models_are_named_and_refused(key: str, words: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(4, 4)}, tmp_path / "foreign.safetensors")
    with pytest.raises(AdapterFormatError, match=words):
        load_adapter(tmp_path / "foreign.safetensors")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_pickles_never_execute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("raw.pt", pickle.dumps(Evil())), ("text.bin", b"hello"), ("empty.ckpt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AdapterFormatError):
            load_adapter(tmp_path / name)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(AdapterFormatError, match="execute code"):
        load_adapter(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    for name in ("bomb.pt", "bomb.safetensors"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
        with pytest.raises(AdapterFormatError):
            load_adapter(tmp_path / name)


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="is a folder"):
        load_adapter(tmp_path)
    with pytest.raises(AdapterFormatError, match="no such file"):
        load_adapter(tmp_path / "missing.safetensors")


def small_adapter() -> Adapter:
    rng = torch.Generator().manual_seed(1)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = LoRALayer(down=torch.randn(2, 48, generator=rng), up=torch.randn(48, 2, generator=rng), alpha=1.5)
    return Adapter(layers={path: layer}, metadata=AdapterMetadata(name="x", family="tiny-sd"))


@pytest.mark.parametrize("write", [save_adapter, save_kohya])
def test_mutated_files_give_typed_errors_or_a_whole_adapter(
    write: Callable[[Adapter, Path], None], tmp_path: Path
) -> None:
    """Half of the mutations change the header; the rest are anywhere in the file."""
    path = tmp_path / "whole.safetensors"
    adapter = small_adapter()
    write(adapter, path)
    content, rng = path.read_bytes(), random.Random(7)
    header = 8 + int.from_bytes(content[:8], "little")
    outcomes = {"refused": 0, "equal": 0, "other values": 0}
    for _ in range(MUTATIONS // 2):
        path.write_bytes(mutate(content, header, rng))
        try:
            back = load_adapter(path)
        except AdapterFormatError:
            outcomes["refused"] += 1
            continue
        outcomes["equal" if adapter_hash(back) == adapter_hash(adapter) else "other values"] += 1
    assert outcomes["refused"] > MUTATIONS // 8, outcomes
    if write is save_adapter:
        assert outcomes["other values"] == 0, outcomes  # the metadata has a content hash


def mutate(content: bytes, header: int, rng: random.Random) -> bytes:
    """Apply one to three mutations: flip a bit, or set, drop or repeat bytes, or truncate."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(min(header, len(data)) if rng.random() < 0.5 else len(data))
        action = rng.choice(["flip", "set", "drop", "double", "cut"])
        if action == "flip":
            data[position] ^= 1 << rng.randrange(8)
        elif action == "set":
            data[position] = rng.choice(b'0129"{}[],:-\0\xff')
        elif action == "drop":
            del data[position]
        elif action == "double":
            data[position:position] = data[position : position + rng.randint(1, 9)]
        else:
            del data[max(position, 9) :]
    return bytes(data)
