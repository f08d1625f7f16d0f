"""All training methods: a zero start, training, saved files and invalid settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.cli import main
from lora_diffusion.config import methods
from lora_diffusion.config.adapter import INVALID_COMBINATIONS, AdapterConfig
from lora_diffusion.config.defaults import default_settings
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.in_place import blended_weights
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base, module_at
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.methods.injection import adapter_disabled, extract_adapter
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from lora_diffusion.workflows.training.method_sizes import measure_method
from tests.helpers.method_cases import KINDS, METHODS, MOMENT, config_of, injected, predicted, shake
from tests.helpers.short_runs import loss_before, settings, short_run
from train_scripts.compare_methods import best_rate, known


@pytest.mark.parametrize("method", METHODS)
def test_new_layers_do_not_change_the_output(method: str, sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    before = predicted(base)
    paths, _ = injected(base, config_of(method))
    for name in base.family.components:
        getattr(base.pipe, name).eval()
    assert torch.equal(predicted(base), before)
    adapter = extract_adapter(base, paths, AdapterMetadata(family=base.family.name), torch.float32)
    for path, layer in adapter.layers.items():
        weight = module_at(base, path).weight.detach()
        assert float(layer.delta(weight).norm()) <= 1e-4 * float(weight.norm())


@pytest.mark.parametrize("method", METHODS)
def test_saved_adapter_predicts_what_the_trained_modules_predict(method: str, sd_folder: Path) -> None:
    base, fresh = load_base(str(sd_folder)), load_base(str(sd_folder))
    paths, made = injected(base, config_of(method))
    shake(made.parameters)
    base.pipe.unet.eval()
    trained = predicted(base)
    with adapter_disabled(base):
        alone = predicted(base)
    timed = {"min_rank": 1} if method == "t-lora" else {}
    adapter = extract_adapter(base, paths, AdapterMetadata(family=base.family.name, **timed), torch.float32)
    with blended_weights(fresh, Blend(entries=(WeightedAdapter(adapter=adapter),)), MOMENT):
        again = predicted(fresh)
    moved = float((trained - alone).norm())
    assert moved > 1e-3 * float(alone.norm())
    assert float((trained - again).norm()) < 1e-3 * moved
    assert torch.equal(predicted(fresh), alone)


PROMPT = GenerateConfig(prompt="a white house in the snow, in sks style", num_inference_steps=3)


@pytest.fixture(scope="module")
def start_loss(ink: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Compute the validation loss of the base, with which every method starts: its new layers change nothing."""
    return loss_before(short_run(ink, tmp_path_factory.mktemp("base") / "it.safetensors", 1))


@pytest.fixture(scope="module")
def base_image(tiny: Base) -> np.ndarray:
    """Generate the image of the base alone."""
    return np.asarray(generate(tiny, [PROMPT], Blend())[0].image, dtype=float)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_on_the_embedded_base(
    method: str, ink: Path, tmp_path: Path, tiny: Base, start_loss: float, base_image: np.ndarray
) -> None:
    """The validation loss falls, samples change, and the file contains layers of the configured kind."""
    rate = {"vera": 2e-1, "adalora": 2e-2, "mixed": 1e-3, "loha": 2e-2}.get(method, 5e-3)
    changes = {"adapter": METHODS[method], "optimizer": {"learning_rate": rate}}
    result = train(short_run(ink, tmp_path / "it.safetensors", 14, changes))
    after = read_log(tmp_path / "it-run" / LOG)[-1]["validation"]["loss"]
    assert after < 0.97 * start_loss
    adapter = load_adapter(result.path)
    assert adapter.hash == result.adapter.hash
    found = [layer for path, layer in adapter.layers.items() if ".attn" in path]
    assert all(isinstance(layer, KINDS.get(method, LoRALayer)) for layer in found)
    (moved,) = generate(tiny, [PROMPT], Blend(entries=(WeightedAdapter(adapter=adapter),)))
    assert np.abs(np.asarray(moved.image, dtype=float) - base_image).mean() > 1


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"optimizer": {"kind": "schedule-free"}, "adapter": {"kind": "sparse"}}, ("'schedule-free'", "'sparse'")),
        (
            {"optimizer": {"kind": "schedule-free"}, "adapter": {"max_delta_norm": 1.0}},
            ("'schedule-free'", "max_delta_norm"),
        ),
        (
            {"optimizer": {"kind": "schedule-free"}, "textual_inversion": {"placeholder_tokens": ["sks"]}},
            ("'schedule-free'", "textual_inversion.placeholder_tokens"),
        ),
        ({"optimizer": {"ema_decay": 0.9}, "adapter": {"kind": "adalora"}}, ("ema_decay", "'adalora'")),
        (
            {
                "textual_inversion": {"placeholder_tokens": ["sks"], "start_adapter_at": 0.5},
                "adapter": {"kind": "adalora"},
            },
            ("textual_inversion.start_adapter_at", "'adalora'"),
        ),
    ],
)
def test_settings_that_conflict_with_the_method_are_rejected(
    table: dict[str, Any], words: tuple[str, ...], ink: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        short_run(ink, ink / "it.safetensors", 4, table)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_computed_sizes_equal_those_of_injected_layers(method: methods.Method, tmp_path: Path) -> None:
    size = measure_method(method, "tiny-sd")
    table = methods.with_method(default_settings("style", "tiny-sd"), method)
    table |= {"output": tmp_path / "it.safetensors"}
    shutil.copytree(sample_data_folder() / "styles" / "ink", tmp_path / "ink")
    table["data"] = tmp_path / "ink"
    run = set_up(validate(TrainConfig, table, source="test"))
    assert size.trained == sum(parameter.numel() for parameter in run.parameters.values())
    assert size.modules == len(run.paths)
    if method.name not in ("adalora", "sparse"):  # their files depend on what is pruned
        saved = extract_adapter(run.base, run.paths, AdapterMetadata(), torch.float16)
        words = sum(vectors.numel() for vectors in run.learned_tokens.parameters.values()) if run.learned_tokens else 0
        assert size.saved == saved.num_parameters + words


def test_default_rates_of_methods_are_the_best_measured() -> None:
    rates = {method.name: method.rate for method in methods.METHODS}
    for name, row in known()["methods"].items():
        assert rates[name] == best_rate(row) == row["rate"], name


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--rank", "4", "dora", "vera"]) == 0
    said = capsys.readouterr().out
    assert "--set 'adapter.use_dora=true'" in said
    assert "arXiv:2310.11454" in said
    assert main(["methods", "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == [each.name for each in methods.METHODS]
    assert main(["methods", "drola"]) == 2
    assert "unknown method 'drola'" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_files_of_all_methods_are_converted_merged_and_inspected(
    method: str, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of(method))
    shake(made.parameters)
    metadata = AdapterMetadata(name="it", family=base.family.name)
    adapter = extract_adapter(base, paths, metadata, torch.float32)
    own, theirs = tmp_path / "it.safetensors", tmp_path / "kohya.safetensors"
    save_adapter(adapter, own)  # for T-LoRA only the factors; its ranks by timestep are tested elsewhere
    assert main(["convert", str(own), str(theirs), "--to", "kohya"]) == 0
    again = load_adapter(theirs)
    assert again.paths == adapter.paths
    for path, layer in adapter.layers.items():
        weight = module_at(base, path).weight.detach()
        before = layer.delta(weight)
        assert torch.allclose(before, again.layers[path].delta(weight).reshape(before.shape), atol=1e-5), path
    assert main(["verify", str(own), "--base", str(sd_folder)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == ", ".join(adapter.kinds)
    assert (
        main(["merge", "--base", str(sd_folder), "--adapter", f"{own}:0.5", "--output", str(tmp_path / "merged")]) == 0
    )
    merged = load_base(str(tmp_path / "merged"))
    with blended_weights(
        load_base(str(sd_folder)), Blend(entries=(WeightedAdapter(adapter=adapter, weight=0.5),))
    ) as patch:
        for path in paths:
            assert torch.allclose(module_at(merged, path).weight, module_at(patch.base, path).weight, atol=1e-6), path


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"use_dora": True, "kind": "vera"}, ("use_dora", "'vera'")),
        ({"freeze_down": True, "kind": "loha"}, ("freeze_down", "'loha'")),
        ({"init_weights": "pissa", "kind": "dylora"}, ("'pissa'", "'dylora'")),
        ({"init_weights": "pissa", "freeze_down": True}, ("'pissa'", "freeze_down")),
        ({"init_weights": "pissa", "use_dora": True}, ("'pissa'", "use_dora")),
        ({"use_rslora": True}, ("use_rslora", "alpha")),
        ({"use_rslora": True, "alpha": 2, "kind": "vera"}, ("use_rslora", "'vera'")),
        ({"dropout": 0.1, "use_dora": True}, ("dropout", "use_dora")),
        ({"max_delta_norm": 1.0, "kind": "lokr"}, ("max_delta_norm", "'lokr'")),
        ({"kind": "t-lora", "text_encoder_target_modules": ["attention"]}, ("'t-lora'", "text_encoder_target_modules")),
        ({"kind": "t-lora", "rank": 2, "min_rank": 4}, ("min_rank", "rank")),
        ({"init_from": "a.safetensors", "use_dora": True, "rank": 2}, ("init_from", "rank and use_dora")),
        ({"rank_pattern": {"*": 2}, "kind": "adalora"}, ("rank_pattern", "'adalora'")),
        ({"max_delta_norm": 1.0, "freeze_down": True}, ("max_delta_norm", "freeze_down")),
        ({"max_delta_norm": 1.0, "kind": "sparse"}, ("max_delta_norm", "'sparse'")),
        ({"kind": "t-lora", "modules_to_save": ["*.norm1"]}, ("'t-lora'", "modules_to_save")),
        ({"sparse_keep": 0.2}, ("sparse_keep", "'sparse'")),
        ({"kind": "dylora", "decompose_factor": 4}, ("decompose_factor", "'dylora'")),
    ],
)
def test_invalid_combinations_are_rejected(table: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(AdapterConfig, table, source="adapter")
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert len(INVALID_COMBINATIONS) == 13


def test_module_in_two_kinds_of_targets_is_rejected(pictures: Path, sd_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save and by the target modules"):
        train(settings(pictures, sd_folder, {"adapter": {"modules_to_save": ["unet.*.to_q"]}}))
    with pytest.raises(ConfigError, match=r"'unet.nowhere' matches no module"):
        train(settings(pictures, sd_folder, {"adapter": {"modules_to_save": ["unet.nowhere"]}}))
