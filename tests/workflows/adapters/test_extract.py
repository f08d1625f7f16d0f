"""Extracting adapters from checkpoints: accuracy, reported errors, and reports of everything left out."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.cli.commands.extract import Approximate, Extract
from lora_diffusion.config.adapter_files import ExtractConfig
from lora_diffusion.config.combine import RankRule
from lora_diffusion.config.settings import EMBEDDED_BASE
from lora_diffusion.errors import BaseModelError, ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.in_place import blended_weights, weight_at
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base
from lora_diffusion.workflows.adapters.extract import approximate_file, extract_file
from tests.conftest import random_adapter
from tests.helpers.extraction import PATH, product

UNET = ("unet", "diffusion_pytorch_model.safetensors")
TEXT = ("text_encoder", "model.safetensors")


def altered(base: Base, folder: Path, file: tuple[str, str], change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a base model and change the tensors of one of its files."""
    shutil.copytree(base.folder, folder)
    tensors = load_file(folder.joinpath(*file))
    change(tensors)
    save_file(tensors, folder.joinpath(*file), metadata={"format": "pt"})
    return folder


def add(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    """Return a change that adds normal noise with a standard deviation of `value` to one tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        rng = torch.Generator().manual_seed(5)
        tensors[key] = tensors[key] + value * torch.randn(tensors[key].shape, generator=rng)

    return change


def settings_for(rule: RankRule | None = None, **changes: object) -> ExtractConfig:
    return ExtractConfig.model_validate({"rule": rule or RankRule(rank=4), **changes})


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_extracting_a_merged_adapter_restores_its_delta(
    family: str, output: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    adapter = random_adapter(base, seed=1, rank=4, alpha=3.0, unet=("all",), text_encoders=("all",))
    blend = Blend(entries=(WeightedAdapter(adapter=adapter),))
    merge(str(base.folder), blend, tmp_path / output)
    done = extract_file(str(tmp_path / output), str(base.folder), tmp_path / "out.safetensors", settings_for())
    again = load_adapter(tmp_path / "out.safetensors")
    assert set(again.layers) == set(adapter.layers)
    for path, layer in adapter.layers.items():
        expected, found = layer.delta(), again.layers[path]
        assert isinstance(found, LoRALayer)
        assert found.rank == min(4, found.weight_shape[0])
        assert found.weight_shape == layer.weight_shape
        assert (found.delta() - expected).norm() < 1e-4 * expected.norm(), path
    assert done.whole_error < 1e-4
    assert not done.left_out
    with blended_weights(base, Blend(entries=(WeightedAdapter(adapter=again),))):
        live = {path: weight_at(base, path).clone() for path in base.paths}
    with blended_weights(base, blend):
        assert all(torch.allclose(live[path], weight_at(base, path), atol=2e-5) for path in base.paths)


def test_small_text_encoder_difference_is_extracted(sd: Base, tmp_path: Path) -> None:
    key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    names = load_file(sd.folder.joinpath(*TEXT))
    key = key if key in names else key.removeprefix("text_model.")
    tuned = altered(sd, tmp_path / "tuned", TEXT, add(key, 1e-4))
    done = extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for(RankRule(rank=999)))
    (path,) = done.extraction.layers
    assert path == "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert len(done.extraction.equal) == len(sd.paths) - 1
    expected = load_file(tuned.joinpath(*TEXT))[key].double() - names[key].double()
    assert float((product(done.extraction.layers[path]) - expected).norm() / expected.norm()) < 1e-5


def change_weights_norms_and_biases(tensors: dict[str, Tensor]) -> None:
    for key in ("conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "conv_norm_out.bias"):
        add(key, 0.01)(tensors)


def test_norms_and_biases_left_out_are_reported(sd: Base, tmp_path: Path) -> None:
    tuned = altered(sd, tmp_path / "tuned", UNET, change_weights_norms_and_biases)
    done = extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for(RankRule(rank=2)))
    assert {kind: group.count for kind, group in done.left_out.items()} == {"biases": 2, "norm weights": 1}
    before, after = (load_file(folder.joinpath(*UNET)) for folder in (sd.folder, tuned))
    differ = {
        key: (after[key].double() - before[key].double()).flatten(1 if after[key].ndim > 1 else 0) for key in after
    }
    weight = differ.pop("conv_in.weight").flatten(1)
    left = math.hypot(*(float(value.norm()) for value in differ.values()))
    assert done.left_out_norm == pytest.approx(left, rel=1e-5)
    lost = float((weight - product(done.extraction.layers[PATH])).norm())
    whole = math.hypot(left, float(weight.norm()))
    assert done.whole_error == pytest.approx(math.hypot(left, lost) / whole, rel=1e-5)
    assert not load_adapter(done.output).biases


def test_norms_and_biases_can_be_kept(sd: Base, tmp_path: Path) -> None:
    tuned = altered(sd, tmp_path / "tuned", UNET, change_weights_norms_and_biases)
    how = settings_for(RankRule(rank=99), norms_and_biases="keep", dtype="float32")
    done = extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", how)
    assert (len(done.kept), dict(done.left_out)) == (3, {})
    blend = Blend(entries=(WeightedAdapter(adapter=load_adapter(done.output)),))
    merge(str(sd.folder), blend, tmp_path / "again")
    again, expected = (load_file(folder.joinpath(*UNET)) for folder in (tmp_path / "again", tuned))
    assert all(torch.allclose(again[key], expected[key], atol=1e-6) for key in expected)


def test_targets_select_modules_and_the_rest_is_reported(sd: Base, tmp_path: Path) -> None:
    adapter = random_adapter(sd, seed=1, unet=("all",), text_encoders=("all",))
    merge(str(sd.folder), Blend(entries=(WeightedAdapter(adapter=adapter),)), tmp_path / "tuned")
    how = settings_for(unet_target_modules=("convolutions", "mid_block.*"), text_encoder_target_modules=())
    done = extract_file(str(tmp_path / "tuned"), str(sd.folder), tmp_path / "x.safetensors", how)
    inner = [path.removeprefix("unet.") for path in done.extraction.layers]
    assert all(path.startswith("mid_block.") or path.rsplit(".", 1)[-1].startswith("conv") for path in inner)
    count = done.left_out["modules beyond the targets"].count
    assert count + len(inner) == len(adapter.layers)
    norms = {path: float(layer.delta().double().norm()) for path, layer in adapter.layers.items()}
    left = math.hypot(*(norms[path] for path in norms if path not in done.extraction.layers))
    assert done.left_out_norm == pytest.approx(left, rel=1e-4)


def test_larger_vocabulary_is_accepted(sd: Base, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("token_embedding.weight"))
        tensors[key] = torch.cat([tensors[key], torch.full((2, tensors[key].shape[1]), 0.5)])
        add(next(key for key in tensors if key.endswith("layers.1.mlp.fc1.weight")), 0.01)(tensors)

    tuned = altered(sd, tmp_path / "tuned", TEXT, change)
    done = extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for())
    assert list(done.extraction.layers) == ["text_encoder.text_model.encoder.layers.1.mlp.fc1"]
    assert done.left_out["embeddings"].count == 1
    assert done.left_out["embeddings"].norm == pytest.approx(0.5 * math.sqrt(2 * 32))


def test_metadata_records_the_extraction(sd: Base, tmp_path: Path) -> None:
    tuned = altered(sd, tmp_path / "tuned", UNET, add("conv_in.weight", 0.01))
    done = extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for(RankRule(threshold=0.01)))
    metadata = load_adapter(done.output).metadata
    assert (metadata.family, metadata.base_hash) == (sd.family.name, sd.hash)
    made = metadata.training["extraction"]
    assert (made["rule"], made["tuned"]) == ("threshold 0.01", str(tuned))
    assert made["relative_error"] == done.extraction.report.total.relative


def test_factors_have_the_dtype_of_the_checkpoints_or_the_requested_one(sd: Base, tmp_path: Path) -> None:
    def halved(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].half()

    def tuned_half(tensors: dict[str, Tensor]) -> None:
        halved(tensors)
        tensors["conv_in.weight"] = tensors["conv_in.weight"] * 1.5

    one, two = (altered(sd, tmp_path / n, UNET, f) for n, f in (("one", halved), ("two", tuned_half)))
    how = settings_for(text_encoder_target_modules=())
    for requested, expected in (("keep", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        done = extract_file(
            str(two), str(one), tmp_path / f"{requested}.safetensors", how.model_copy(update={"dtype": requested})
        )
        layer = load_adapter(done.output).layers[PATH]
        assert {factor.dtype for factor in layer.factors.values()} == {expected}
    done = extract_file(str(two), str(sd.folder), tmp_path / "mixed.safetensors", how)
    assert load_adapter(done.output).layers[PATH].factors["up"].dtype == torch.float32


def test_equal_checkpoints_have_nothing_to_extract(sd: Base, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match="nothing to extract; its UNet and text encoders are equal to those of"):
        extract_file(str(sd.folder), str(sd.folder), out, settings_for())
    tuned = altered(sd, tmp_path / "tuned", UNET, add("conv_in.bias", 0.01))
    with pytest.raises(ConfigError, match=r"nothing to extract at the targets; only biases \(1\) differ"):
        extract_file(str(tuned), str(sd.folder), out, settings_for())
    assert not out.exists()


def test_existing_files_are_not_overwritten(sd: Base, tmp_path: Path) -> None:
    tuned = altered(sd, tmp_path / "tuned", UNET, add("conv_in.weight", 0.01))
    before = tuned.joinpath(*UNET).read_bytes()
    with pytest.raises(OutputError, match="is one of the inputs"):
        extract_file(str(tuned), str(sd.folder), tuned.joinpath(*UNET), settings_for(force=True))
    with pytest.raises(OutputError, match="is one of the inputs"):
        approximate_file(str(tuned), tuned.joinpath(*UNET), settings_for(force=True))
    assert tuned.joinpath(*UNET).read_bytes() == before
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for())
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for(force=True))
    assert list(load_adapter(tmp_path / "x.safetensors").layers) == [PATH]


def test_checkpoints_of_different_architectures_are_rejected(sd: Base, sdxl: Base, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(FamilyMismatchError, match=r"is tiny SDXL, but .* is tiny SD"):
        extract_file(str(sdxl.folder), str(sd.folder), out, settings_for())

    def wider(tensors: dict[str, Tensor]) -> None:
        tensors["conv_in.weight"] = torch.zeros(32, 9, 3, 3)

    tuned = altered(sd, tmp_path / "tuned", UNET, wider)
    with pytest.raises(FamilyMismatchError, match=r"unet\.conv_in\.weight is \(32, 9, 3, 3\) .* \(32, 4, 3, 3\)"):
        extract_file(str(tuned), str(sd.folder), out, settings_for())
    lacking = altered(sd, tmp_path / "lacking", UNET, lambda tensors: tensors.__delitem__("conv_out.bias"))
    for one, two in ((lacking, sd.folder), (sd.folder, lacking)):
        with pytest.raises(FamilyMismatchError, match=r"unet\.conv_out\.bias is .*missing"):
            extract_file(str(one), str(two), out, settings_for())


@pytest.mark.parametrize("key", ["conv_in.weight", "conv_in.bias"])
def test_checkpoint_with_nan_is_rejected(key: str, sd: Base, tmp_path: Path) -> None:
    tuned = altered(sd, tmp_path / "tuned", UNET, lambda tensors: tensors.update({key: tensors[key] * math.nan}))
    with pytest.raises(BaseModelError, match=r"unet\.conv_in.*contains NaN"):
        extract_file(str(tuned), str(sd.folder), tmp_path / "x.safetensors", settings_for())
    assert not (tmp_path / "x.safetensors").exists()


def test_low_rank_part_of_a_base_approximates_its_weights(sd: Base, tmp_path: Path) -> None:
    done = approximate_file(str(sd.folder), tmp_path / "low.safetensors", settings_for(RankRule(rank=3)))
    adapter = load_adapter(done.output)
    assert set(adapter.layers) == set(sd.paths)
    for path in (PATH, "text_encoder.text_model.encoder.layers.0.mlp.fc1"):
        weight = weight_at(sd, path).double().flatten(1)
        values = torch.linalg.svdvals(weight)
        error = float((adapter.layers[path].delta().double().flatten(1) - weight).norm())
        assert error == pytest.approx(float(values[3:].square().sum().sqrt()), rel=1e-4)
        assert done.extraction.report.modules[path].lost == pytest.approx(error, rel=1e-4)
    assert {"biases", "norm weights", "embeddings"} == set(done.left_out)


def test_the_low_rank_part_of_a_base_cannot_be_added_to_one(sd: Base, tmp_path: Path) -> None:
    done = approximate_file(str(sd.folder), tmp_path / "low.safetensors", settings_for(RankRule(rank=1)))
    adapter = load_adapter(done.output)
    assert adapter.metadata.name.startswith("low-rank part of")
    assert "do not add it to a base" in adapter.metadata.description
    with (
        pytest.raises(FamilyMismatchError, match="is an adapter for low-rank part of tiny SD, but"),
        blended_weights(sd, Blend(entries=(WeightedAdapter(adapter=adapter),))),
    ):
        pass


def test_extract_and_approximate_commands(sd: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, out = altered(sd, tmp_path / "tuned", UNET, change_weights_norms_and_biases), tmp_path / "x.safetensors"
    command = [str(tuned), str(out), "--base", str(sd.folder), "--quantile", "0.5", "--at-most", "5"]
    assert tyro.cli(Extract, args=command).run() == 0
    text = capsys.readouterr().out
    assert "left out: biases (2), norm weights (1)" in text
    assert tyro.cli(Extract, args=[*command, "--force", "--json", "--norms-and-biases", "keep"]).run() == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layers"], facts["norms_and_biases"], facts["by_module"][PATH]["rank_after"]) == (1, 3, 5)
    assert facts["bytes"] == out.stat().st_size
    assert tyro.cli(Approximate, args=[EMBEDDED_BASE, str(tmp_path / "low.safetensors"), "--rank", "1"]).run() == 0
    assert "not to be added to a base" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--rank", "4", "--quantile", "0.5"), ("--at-most", "4")])
def test_extract_command_needs_one_rank_rule(flags: tuple[str, ...], tmp_path: Path) -> None:
    command = [EMBEDDED_BASE, str(tmp_path / "x.safetensors"), "--base", EMBEDDED_BASE, *flags]
    with pytest.raises(ConfigError, match=r"give a rank flag|exactly one of rank"):
        tyro.cli(Extract, args=command).run()
