"""Adapter files made into one and resized: what is written, said and refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, cast_adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import DoRALayer, Layer, LoRALayer
from lora_diffusion.algebra.combine.methods import combine_by_consensus
from lora_diffusion.cli import main
from lora_diffusion.config.combine import CombineConfig, ConsensusConfig, RankRule
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.in_place import blended_weights, weight_at
from lora_diffusion.library.references import load_blend
from lora_diffusion.models.load import Base
from lora_diffusion.workflows.adapters.combine import combine_files
from tests.algebra.test_combine import dense, summed
from tests.conftest import random_adapter


@pytest.fixture
def files(sd: Base, folder: Path) -> list[Path]:
    adapters = [random_adapter(sd, seed=1, rank=4, alpha=2.0, unet=("all",)), random_adapter(sd, seed=2, rank=2)]
    trained = {"steps": 7, "ss_network_dim": "4", "ss_tag_frequency": "{}"}
    changes: list[dict[str, Any]] = [{"training": trained}, {"trigger_words": ("sks", "zwx")}]
    paths = [folder / "one.safetensors", folder / "two.safetensors"]
    for path, adapter, change in zip(paths, adapters, changes, strict=True):
        save_adapter(replace(adapter, metadata=adapter.metadata.model_copy(update=change)), path)
    return paths


def test_a_combined_file_holds_the_blend_and_says_what_made_it(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.safetensors"
    assert main(["combine", f"{files[0]}:0.8", f"{files[1]}:-0.5:te=0", str(out)]) == 0
    assert "the sum is exact, rounding changed the delta by 0.00%" in capsys.readouterr().out
    one, two = map(load_adapter, files)
    loaded = load_adapter(out)
    assert set(loaded.layers) == set(one.layers) | set(two.layers)
    for path, layer in loaded.layers.items():
        second = 0.0 if path.startswith("text_encoder") else -0.5
        pairs = [(0.8, one.layers[path])] + ([(second, two.layers[path])] if path in two.layers else [])
        torch.testing.assert_close(dense(layer), summed(pairs), atol=1e-6, rtol=1e-5)
    metadata = loaded.metadata
    assert (metadata.name, metadata.family, metadata.trigger_words) == ("both", one.metadata.family, ("sks", "zwx"))
    assert metadata.merged_from == (f"random-1 ({one.hash[:16]})", f"random-2 ({two.hash[:16]})")
    made = metadata.training["combination"]
    assert (made["rule"], made["relative_error"]) == ("exact", 0)
    assert [(part["file"], part["hash"]) for part in made["adapters"]] == [
        ("one.safetensors", one.hash),
        ("two.safetensors", two.hash),
    ]
    assert made["adapters"][1]["weight"]["components"] == {"text_encoder": 0, "text_encoder_2": 0}


def test_a_resized_file_reports_its_true_error(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    assert main(["resize", str(files[0]), str(out), "--keep", "0.9", "--at-most", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    before, after = load_adapter(files[0]), load_adapter(out)
    pairs = {path: (dense(layer), dense(after.layers[path])) for path, layer in before.layers.items()}
    lost = math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs.values()))
    whole = math.sqrt(sum(float(x.square().sum()) for x, _ in pairs.values()))
    assert facts["error"] == pytest.approx(lost / whole, rel=1e-5)
    assert set(facts["by_module"]) == set(before.layers)
    assert facts["bytes_after"] == out.stat().st_size < facts["bytes_before"] == files[0].stat().st_size
    training = after.metadata.training
    assert (training["steps"], training["ss_tag_frequency"]) == (7, "{}")
    assert "ss_network_dim" not in training
    assert training["combination"]["rule"] == "keep 0.9, at most 3"
    assert training["combination"]["relative_error"] == pytest.approx(facts["error"])
    assert main(["resize", str(files[0]), str(out), "--rank", "1", "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["block", "modules", "old", "rank", "new", "rank", "norm", "error"]
    assert lines[-1].split()[:4] == ["all", str(len(before.layers)), "4", "1"]


def test_the_type_is_that_of_the_inputs_unless_they_differ(files: list[Path], tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_adapter(cast_adapter(load_adapter(files[0]), torch.float16), half)
    entries = [BlendEntry(path=str(path)) for path in (half, half, files[1])]
    for count_, dtype in ((2, torch.float16), (3, torch.float32)):
        done = combine_files(entries[:count_], tmp_path / f"{count_}.safetensors", CombineConfig())
        kinds = {f.dtype for layer in load_adapter(done.output).layers.values() for f in layer.factors.values()}
        assert kinds == {dtype}
        assert (done.rounding_error > 0) == (dtype == torch.float16)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["combine", "ONE"], "give at least one adapter and, last, the output"),
        (["combine", "ONE:0", "TWO:0", "OUT"], "nothing to combine"),
        (["combine", "ONE", "TWO", "ONE"], "is one of the inputs; choose another output"),
        (["combine", "ONE", "TWO", "ONE", "--force"], "is one of the inputs"),
        (["combine", "ONE", "ONE:2", "TWO"], "already exists; choose another output, or replace it with --force"),
        (["combine", "ONE", "TWO", "OUT.txt"], "ends in .safetensors"),
        (["combine", "ONE:start=0.5", "OUT"], "a schedule over denoising steps can only be applied while sampling"),
        (["combine", "ONE:box=0,0,1,0.5", "OUT"], "acts in a region"),
        (["combine", "ONE:1e38", "TWO:1e38", "OUT", "--rank", "2"], "beyond the range of float32"),
        (["combine", "ONE:1e38", "TWO:1e38", "OUT", "--dtype", "float16"], "beyond the range of float16"),
        (["combine", "ONE", "TWO", "OUT", "--rank", "2", "--keep", "0.9"], "not by rank and keep"),
        (["combine", "missing.safetensors", "OUT"], "no such file"),
        (["resize", "ONE", "OUT"], "give exactly one rank flag"),
        (["resize", "ONE", "ONE", "--rank", "2", "--force"], "is one of the inputs"),
        (["resize", "ONE", "OUT", "--keep", "1.5"], "'keep' is '1.5': input should be less than or equal to 1"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    command: list[str], words: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"ONE": files[0], "TWO": files[1], "OUT": tmp_path / "out.safetensors"}
    before = {path: path.read_bytes() for path in files}
    arguments = []
    for part in command:
        name, colon, rest = part.partition(":")
        arguments.append(f"{places.get(name, name)}{colon}{rest}")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in files} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_an_adapter_of_another_family_is_refused(sdxl: Base, files: list[Path], tmp_path: Path) -> None:
    save_adapter(random_adapter(sdxl, seed=1), tmp_path / "xl.safetensors")
    entries = [BlendEntry(path=str(path)) for path in (files[0], tmp_path / "xl.safetensors")]
    with pytest.raises(LoRADiffusionError, match="tiny SD and tiny SDXL in one blend"):
        combine_files(entries, tmp_path / "out.safetensors", CombineConfig())
    assert not (tmp_path / "out.safetensors").exists()


def test_a_consensus_is_written_and_said_and_settings_without_a_method_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [str(sample_data_folder() / "adapters" / f"{name}.safetensors") for name in ("ink", "neon")]
    output = tmp_path / "ties.safetensors"
    assert main(["combine", *inputs, str(output), "--method", "ties", "--density", "0.3"]) == 0
    assert "combined by ties" in capsys.readouterr().out
    found = load_adapter(output)
    assert found.metadata.training["combination"]["consensus"]["density"] == 0.3
    blend = Blend(entries=tuple(WeightedAdapter(adapter=load_adapter(Path(path))) for path in inputs))
    wanted = combine_by_consensus(blend, ConsensusConfig(method="ties", density=0.3), AdapterMetadata())
    path = next(iter(wanted.layers))
    assert torch.allclose(found.layers[path].delta(), wanted.layers[path].delta(), atol=1e-2, rtol=1e-2)
    assert main(["combine", *inputs, str(tmp_path / "no.safetensors"), "--density", "0.3"]) == 2
    assert "--density is a setting of --method; add one" in capsys.readouterr().err


def with_dora(base: Base, plain: Adapter) -> Adapter:
    """The adapter with a magnitude around each layer, 1.2 times the weight's own norms."""

    def decomposed(path: str, layer: Layer) -> Layer:
        assert isinstance(layer, LoRALayer)
        weight = weight_at(base, path)
        norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
        return DoRALayer(inner=layer, magnitude=1.2 * norms)

    return replace(plain, layers={path: decomposed(path, layer) for path, layer in plain.layers.items()})


def test_dora_is_combined_against_its_base(sd: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At full rank it is the blend, to float32's rounding; at a low one it errs as it says."""
    files = [tmp_path / name for name in ("dora.safetensors", "lora.safetensors")]
    save_adapter(with_dora(sd, random_adapter(sd, seed=1)), files[0])
    save_adapter(random_adapter(sd, seed=2, text_encoders=()), files[1])
    entries = [BlendEntry(path=str(files[0]), weight=0.7), BlendEntry(path=str(files[1]), weight=-0.5)]
    whole = combine_files(
        entries, tmp_path / "whole.safetensors", CombineConfig(rule=RankRule(rank=999), base=str(sd.folder))
    )
    with blended_weights(sd, load_blend(entries).blend):
        expected = {path: weight_at(sd, path).clone() for path in whole.adapter.layers}
    with blended_weights(sd, Blend(entries=(WeightedAdapter(adapter=whole.adapter),))):
        for path, weight in expected.items():
            assert (weight_at(sd, path) - weight).norm() < 1e-5 * weight.norm(), path
    arguments = [f"{files[0]}:0.7", f"{files[1]}:-0.5", str(tmp_path / "out.safetensors"), "--rank", "3"]
    assert main(["combine", *arguments]) == 2
    assert "pass the base model with --base" in capsys.readouterr().err
    assert main(["combine", *arguments, "--base", str(sd.folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["error"]
    found = load_adapter(tmp_path / "out.safetensors").layers
    lost = sum(float((found[p].delta() - whole.adapter.layers[p].delta()).square().sum()) for p in found) ** 0.5
    norm = sum(float(layer.delta().square().sum()) for layer in whole.adapter.layers.values()) ** 0.5
    assert lost / norm == pytest.approx(said, rel=1e-3)
    assert 0.1 < said < 1
