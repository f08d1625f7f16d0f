"""Analysis of adapter files: spectra, overlap and amplification, against dense computations, and the command."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.layers import DoRALayer, Layer, LoRALayer
from lora_diffusion.algebra.svd.svd import spectrum_of, truncate_spectrum
from lora_diffusion.cli.commands.analyze import Analyze
from lora_diffusion.config.preset import BaseTerm
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import BaseModelError, ConfigError, FamilyMismatchError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.in_place import weight_at
from lora_diffusion.merging.merge import merge
from lora_diffusion.models.load import Base
from lora_diffusion.workflows.adapters.analyze import analyze_files
from lora_diffusion.workflows.adapters.analyze_report import describe_analysis
from tests.conftest import random_adapter

ADAPTERS = sample_data_folder() / "adapters"
Saved = Callable[..., Path]


def dense(layer: Layer) -> Tensor:
    """Return the delta as a matrix in float64."""
    return layer.delta().double().flatten(1)


def dense_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], right[:rank].T


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    def save(adapter: Adapter, name: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_adapter(replace(adapter, metadata=adapter.metadata.model_copy(update={"name": name})), path)
        return path

    return save


def run(*arguments: object) -> int:
    return tyro.cli(Analyze, args=[str(argument) for argument in arguments]).run()


def check_plot(path: Path) -> None:
    """Check that an image has many shades, and that most of it is background."""
    with Image.open(path) as image:
        shades = np.asarray(image.convert("L"))
    assert min(shades.shape) > 300
    assert len(np.unique(shades)) > 50
    assert 0.02 < (shades < 250).mean() < 0.98


def test_command_prints_and_plots_the_sample_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [ADAPTERS / f"{name}.safetensors" for name in ("gloop", "neon", "zuki")]
    assert run(*files, "--base", "tiny-sd", "--plots", tmp_path / "plots", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    plots = [Path(path) for path in report["plots"]]
    assert {path.name for path in plots} == {path.name for path in (tmp_path / "plots").iterdir()}
    assert len(plots) == 5
    for path in plots:
        check_plot(path)
    for key in ("cosine", "shared"):
        square = np.array(report[key])
        assert (square == square.T).all() and (np.diag(square) == 1).all() and (np.abs(square) <= 1).all()
    neon = load_adapter(files[1])
    path, layer = next(iter(neon.layers.items()))
    stated = report["adapters"][1]["modules"][path]
    assert stated["norm"] == pytest.approx(float(dense(layer).norm()), rel=1e-5)
    assert stated["values"] == pytest.approx(torch.linalg.svdvals(dense(layer))[: layer.rank].tolist(), rel=1e-4)
    text = describe_analysis(report)
    assert all(name in text for name in ("gloop + zuki", "unet.mid_block", "|U'WV|"))
    with pytest.raises(OutputError, match=r"spectrum.png: already exists.*--force"):
        run(*files, "--plots", tmp_path / "plots")


def test_one_adapter_has_spectra_but_no_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ADAPTERS / "ink.safetensors", "--plots", tmp_path) == 0
    assert "overlap" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["effective_rank.png", "spectrum.png"]
    assert run(ADAPTERS / "ink.safetensors", "--plots", tmp_path, "--force") == 0


def test_truncated_adapter_lies_in_the_subspace_of_the_full_one(tmp_path: Path) -> None:
    neon = load_adapter(ADAPTERS / "neon.safetensors")
    lower = {path: truncate_spectrum(spectrum_of([(1.0, layer)]), 3) for path, layer in neon.layers.items()}
    path = tmp_path / "lower.safetensors"
    save_adapter(replace(neon, layers=lower), path)
    report = analyze_files([ADAPTERS / "neon.safetensors", path])
    (pair,) = report["pairs"]
    assert report["names"] == ["neon", "lower"]  # both have the name neon in their metadata
    for side in ("input", "output"):
        assert np.array(pair[side]["similarity"]).shape == (8, 3)
        assert np.array(pair[side]["similarity"]) == pytest.approx(1, abs=1e-3)
        assert pair[side]["distance"] == pytest.approx(0, abs=1e-3)
    assert pair["second_share"] == pytest.approx(1, abs=1e-5)
    kept = [report["adapters"][0]["modules"][m] for m in lower]
    energy = sum(k["norm"] ** 2 * k["energy"][2] for k in kept) / sum(k["norm"] ** 2 for k in kept)
    assert pair["first_share"] == pytest.approx(energy, rel=1e-4)
    assert pair["cosine"] == pytest.approx(math.sqrt(energy), rel=1e-4)


def test_amplification_uses_the_weights_of_the_base(sd: Base, saved: Saved) -> None:
    adapter = random_adapter(sd, seed=1)
    report = analyze_files([saved(adapter, "one")], base=str(sd.folder))
    for path, found in report["adapters"][0]["amplification"]["modules"].items():
        U, V = dense_directions(dense(adapter.layers[path]), 4)
        expected = float((U.T @ weight_at(sd, path).double().flatten(1) @ V).norm())
        assert found["projected"] == pytest.approx(expected, rel=1e-4)
    assert len(report["adapters"][0]["amplification"]["modules"]) == len(adapter.layers)


def dora(base: Base, layer: LoRALayer, path: str) -> DoRALayer:
    weight = weight_at(base, path)
    return DoRALayer(inner=layer, magnitude=1.5 * weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1)))


def test_dora_is_measured_only_if_a_base_is_given(
    sd: Base, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = random_adapter(sd, seed=1)
    path, layer = next(iter(plain.layers.items()))
    assert isinstance(layer, LoRALayer)
    mixed = replace(plain, layers={**plain.layers, path: dora(sd, layer, path)})
    file = saved(mixed, "mixed")
    assert run(file) == 0
    assert f"mixed: 1 modules left out: DoRA needs the base's weight (first: {path})" in capsys.readouterr().out
    merge(str(sd.folder), Blend(), tmp_path / "one.safetensors", bases=[BaseTerm(added=str(sd.folder), weight=0.0)])
    delta = mixed.layers[path].delta(weight_at(sd, path))
    for base in (sd.folder, tmp_path / "one.safetensors"):
        found = analyze_files([file], base=str(base))["adapters"][0]
        assert found["left_out"] == {}
        assert found["modules"][path]["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)


def test_errors_say_what_to_do(sd: Base, sdxl: Base, saved: Saved) -> None:
    one, other = saved(random_adapter(sd, seed=1), "one"), saved(random_adapter(sdxl, seed=2), "other")
    with pytest.raises(ConfigError, match="at least one file"):
        analyze_files([])
    with pytest.raises(FamilyMismatchError, match=r"tiny SD and .* for tiny SDXL; analyze one family at a time"):
        analyze_files([one, other])
    with pytest.raises(FamilyMismatchError, match="use the base that the adapter was trained on"):
        analyze_files([ADAPTERS / "ink.safetensors"], base=str(sd.folder))
    with pytest.raises(FamilyMismatchError, match=r"tiny SDXL, but .* is tiny SD"):
        analyze_files([other], base=str(sd.folder))
    with pytest.raises(BaseModelError, match="no such folder"):
        analyze_files([one], base="nowhere")
    with pytest.raises(FamilyMismatchError, match="analyze adapters of one base"):
        analyze_files([one, ADAPTERS / "ink.safetensors"])


def test_adapters_without_a_matrix_are_rejected(sd: Base, saved: Saved) -> None:
    plain = random_adapter(sd, seed=1)
    path, layer = next(iter(plain.layers.items()))
    assert isinstance(layer, LoRALayer)
    words = replace(plain, layers={}, tokens={"sks": {"text_encoder": torch.randn(1, 32)}})
    with pytest.raises(ConfigError, match="no layer whose delta is a matrix"):
        analyze_files([saved(words, "words")])
    with pytest.raises(ConfigError, match="give the base with --base"):
        analyze_files([saved(replace(plain, layers={path: dora(sd, layer, path)}), "dora")])


def test_names_with_dollar_signs_and_disjoint_modules_are_plotted(
    sd: Base, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = random_adapter(sd, seed=1, text_encoders=())
    text = random_adapter(sd, seed=2, unet=())
    assert run(saved(unet, "$a_x$ and $b"), saved(text, "b" * 60), "--plots", tmp_path / "plots") == 0
    assert capsys.readouterr().out.count("$a_x$ and $b") > 3
    assert not (tmp_path / "plots" / "similarity.png").exists()
    check_plot(tmp_path / "plots" / "effective_rank.png")
