"""The commands on adapter files: inspect, convert, verify, as a user runs them, also with wrong input."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.adapters.adapter import adapter_hash, cast_adapter
from lora_diffusion.cli import main
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.workflows.adapters.inspect import inspect_adapter
from tests.helpers.read_counter import count_bytes_read

READY = sample_data_folder() / "adapters"
NEON = READY / "neon.safetensors"
READ_AHEAD = 2**20
"""Bytes that buffered files may read beyond what they are asked for."""


def test_there_and_back_is_the_same_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kohya, native = tmp_path / "kohya.safetensors", tmp_path / "native.safetensors"
    assert main(["convert", str(NEON), str(kohya), "--to", "kohya"]) == 0
    assert main(["convert", str(kohya), str(native), "--to", "native", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "rounding changed the deltas by 0 " in out[0]
    assert json.loads(out[1])[0]["rounding_error"] == 0
    assert adapter_hash(load_adapter(native)) == adapter_hash(load_adapter(NEON))
    assert load_adapter(native).metadata.trigger_words == ("zwx",)


def test_many_at_once_into_a_folder_and_never_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, READY.glob("*.safetensors")))
    command = ["convert", *files, str(tmp_path / "all"), "--to", "kohya", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == len(files)
    assert float(capsys.readouterr().out.split("deltas by ")[1].split()[0]) > 1e-4
    assert main(command) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    half = load_adapter(tmp_path / "all" / "neon.safetensors")
    assert adapter_hash(half) == adapter_hash(cast_adapter(load_adapter(NEON), torch.bfloat16))


def test_a_card_for_the_hub(tmp_path: Path) -> None:
    assert main(["convert", str(NEON), str(tmp_path / "neon.safetensors"), "--to", "native", "--card"]) == 0
    card = (tmp_path / "neon.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert 'instance_prompt: "zwx"' in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", str(NEON), "--to", "kohya"], "at least one input"),
        (["convert", str(NEON), "out.txt", "--to", "kohya"], "expected a folder"),
        (["convert", str(NEON), "out.safetensors", "--to", "embedding"], "has 0 textual-inversion embeddings"),
        (["convert", "missing.safetensors", "out.safetensors", "--to", "native"], "no such file"),
        (["inspect", "missing.safetensors"], "no such file"),
        (["inspect", str(NEON), str(NEON), "--plot", "a.png"], "--plot takes a single adapter, but 2 are given"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_inspect_with_norms_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(NEON), "--norms", "--plot", str(tmp_path / "norms.png")]) == 0
    text = capsys.readouterr().out
    assert "█" in text
    assert adapter_hash(load_adapter(NEON)) in text
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert "norms" not in inspect_adapter(NEON)


def test_inspect_names_dead_and_broken_tensors_of_a_file_that_nothing_else_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn"
    tensors = {
        f"{block}1_to_q.lora_down.weight": torch.full((2, 640), float("nan")),
        f"{block}1_to_q.lora_up.weight": torch.ones(640, 2),
        f"{block}2_to_k.lora_down.weight": torch.ones(2, 768),
        f"{block}2_to_k.lora_up.weight": torch.zeros(640, 2),
    }
    save_file(tensors, tmp_path / "broken.safetensors")
    assert main(["inspect", str(tmp_path / "broken.safetensors"), "--norms", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn"
    assert (facts["non_finite"], facts["dead"]) == ([f"{path}1.to_q down"], [f"{path}2.to_k"])
    assert main(["verify", str(tmp_path / "broken.safetensors")]) == 1


def test_inspect_reads_the_header_alone(tmp_path: Path) -> None:
    """A sparse file of 1 GB, of which only the header has been written."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    down, up = [2**20, 320], [320, 2**20]
    half = 2**20 * 320 * 2
    header = {
        f"{name}.lora_down.weight": {"dtype": "F16", "shape": down, "data_offsets": [0, half]},
        f"{name}.lora_up.weight": {"dtype": "F16", "shape": up, "data_offsets": [half, 2 * half]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * half)
    with count_bytes_read() as counter:
        facts = inspect_adapter(path)
    assert 8 + len(text) <= counter.bytes <= 8 + len(text) + READ_AHEAD
    assert facts["bytes"] > 2**30
    assert facts["ranks"]["max"] == 2**20


def test_verify_answers_with_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(NEON), "--base", "tiny-sd"]) == 0
    assert "fits tiny-sd: " in capsys.readouterr().out
    data = bytearray(NEON.read_bytes())
    data[-1] ^= 1
    (tmp_path / "edited.safetensors").write_bytes(data)
    assert main(["verify", str(tmp_path / "edited.safetensors"), "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    assert checks[0]["passed"] is False
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    dead = {f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.zeros(640, 2)}
    save_file(dead, tmp_path / "dead.safetensors")
    assert main(["verify", str(tmp_path / "dead.safetensors"), "--base", "tiny-sd"]) == 1
    out = capsys.readouterr().out
    assert "deltas are zero" in out
    assert "is an adapter for SD 1.x, but tiny-sd is tiny SD" in out


def test_an_adapter_of_another_family_is_refused_before_its_tensors_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 2048), f"{name}.lora_up.weight": torch.full((640, 2), float("nan"))},
        tmp_path / "xl.safetensors",
    )
    arguments = ["--adapter", str(tmp_path / "xl.safetensors"), "--output", str(tmp_path / "out")]
    for command in (["generate", "--prompt", "a cat"], ["merge"]):
        assert main([*command, *arguments]) == 2
        assert "is an adapter for SDXL, but tiny-sd is tiny SD" in capsys.readouterr().err  # and nothing of the NaN
    assert not (tmp_path / "out").exists()
