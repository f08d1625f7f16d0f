"""Distillation of a blend into one adapter: recorded runs, the mean delta, the held-out error and errors raised."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter, blend_sum
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.layers import DoRALayer, LoRALayer
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendWeight, Composition, Region, Schedule
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import (
    ConfigError,
    FamilyMismatchError,
    TrainingError,
)
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.composition import composition_context
from lora_diffusion.inference.in_place import blended_weights, weight_at
from lora_diffusion.inference.sampling import generate, pipeline_with
from lora_diffusion.models.load import Base, load_base
from lora_diffusion.models.text_encoding import encode_prompts
from lora_diffusion.training.distillation.distill import distill, record_teacher
from lora_diffusion.training.distillation.mean_delta import record_mean_sum
from lora_diffusion.training.distillation.trajectories import SamplingRun, record_runs
from tests.conftest import random_adapter
from tests.helpers.blends import blend_of, parameters
from tests.inference.test_parallel import everywhere

PROMPTS = ("a cat", "a red boat", "sks", "a house at night")
CONFIG = DistillConfig(
    rank=2,
    steps=8,
    learning_rate=5e-3,
    batch_size=4,
    runs=1,
    num_inference_steps=2,
    guidance_scale=1.0,
    resolution=16,
    save_precision="float32",
)
SIZE = (8, 8)
SWITCH = Composition(mode="switch", switch_every=1)


@pytest.fixture(autouse=True)
def _unchanged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that changes a parameter of the base, or leaves gradients, requires_grad or patched forwards."""
    if "sd" not in request.fixturenames:
        yield
        return
    base: Base = request.getfixturevalue("sd")
    parts = {name: getattr(base.pipe, name) for name in ("unet", "text_encoder")}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    yield
    for name, part in parts.items():
        assert all(torch.equal(before[name][key], value) for key, value in part.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
        assert not any("forward" in vars(module) for module in part.modules())


def two(base: Base) -> Blend:
    return blend_of((random_adapter(base, seed=1), 0.8), (random_adapter(base, seed=2, rank=2), 0.6))


def make_config(**changes: Any) -> DistillConfig:
    return validate(DistillConfig, {**CONFIG.model_dump(), **changes}, source="test")


def dora(base: Base) -> Blend:
    """Return a DoRA blend with magnitudes up to 20% above or below the norms of the base's weights."""
    plain = random_adapter(base, seed=3, text_encoders=())
    rng = torch.Generator().manual_seed(0)
    layers = {}
    for path, layer in plain.layers.items():
        norm = weight_at(base, path).norm(dim=1, keepdim=True)
        assert isinstance(layer, LoRALayer)
        layers[path] = DoRALayer(inner=layer, magnitude=norm * (0.8 + 0.4 * torch.rand(norm.shape, generator=rng)))
    return blend_of((replace(plain, layers=layers), 1.0))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_runs_are_those_of_the_pipeline(family: str, guidance: float, request: pytest.FixtureRequest) -> None:
    """The latents of diffusers' pipeline, from the same noise, match the recorded latents at each step."""
    base: Base = request.getfixturevalue(family)
    blend, config = two(base), make_config(guidance_scale=guidance, num_inference_steps=3)
    found: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(tensors["latents"].clone())
        return tensors

    with blended_weights(base, blend):
        pipe = pipeline_with(base, "ddim")
        generator = torch.Generator().manual_seed(7)
        options = {"guidance_scale": guidance, "num_inference_steps": 3, "output_type": "latent"}
        pipe(PROMPTS[0], width=16, height=16, generator=generator, callback_on_step_end=keep, **options)
    with composition_context(base, blend, Composition(), SIZE) as before_step:
        runs = (SamplingRun(prompt=PROMPTS[0], seed=7), SamplingRun(prompt=PROMPTS[1], seed=8))
        pairs = record_runs(base, before_step, runs, config)
    rows = [i for i, text in enumerate(pairs.texts) if text == PROMPTS[0]]
    assert len(pairs) == (12 if guidance > 1 else 6)
    ours = pairs.take(rows).latents
    for latents, own in zip(found[:2], ours[1:], strict=True):
        assert torch.allclose(own, latents[0], atol=1e-3)
    assert not torch.allclose(ours[1], ours[2], atol=1e-1)


def predict(base: Base, latents: Tensor, timestep: Tensor, text: str) -> Tensor:
    with torch.no_grad():
        hidden = encode_prompts(base, [text], size_px=16).hidden
        return base.pipe.unet(latents[None], timestep, hidden).sample[0]


def test_a_switching_blend_is_recorded_with_the_adapter_of_each_step(sd: Base) -> None:
    blend = blend_of((random_adapter(sd, seed=1, text_encoders=()), 0.8), (random_adapter(sd, seed=2), 0.6))
    text = replace(blend.entries[1].adapter, layers=text_layers(blend.entries[1].adapter))
    alone = [blend_of((blend.entries[0].adapter, 0.8), (text, 0.6)), blend_of((blend.entries[1].adapter, 0.6))]
    with composition_context(sd, blend, SWITCH, SIZE) as before_step:
        pairs = record_runs(sd, before_step, [SamplingRun(prompt="a cat", seed=0)], CONFIG)
    for step in range(2):
        with blended_weights(sd, alone[step]):
            expected = predict(sd, pairs.latents[step], pairs.timesteps[step], "a cat")
        assert torch.allclose(pairs.predictions[step], expected, atol=1e-4)


def text_layers(adapter: Adapter) -> dict[str, Any]:
    return {path: layer for path, layer in adapter.layers.items() if not path.startswith("unet.")}


FADING = BlendWeight(value=0.7, schedule=Schedule(points=((0.0, 0.0), (1.0, 1.0)), curve="linear"))


@pytest.mark.parametrize("mode", ["switch", "k-lora", "np-lora", "schedule"])
def test_the_mean_delta_is_the_mean_of_the_weights_over_a_run(sd: Base, mode: str) -> None:
    entries = two(sd).entries
    blend = Blend(entries=(replace(entries[0], weight=FADING), entries[1])) if mode == "schedule" else two(sd)
    composition = Composition() if mode == "schedule" else Composition.model_validate({"mode": mode})
    own = parameters(sd)
    mean = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in own.items()}
    with composition_context(sd, blend, composition, SIZE) as before_step:
        for step in range(8):
            before_step(DenoisingStep(index=step, total=8), lambda: torch.empty(0))
            for name, value in parameters(sd).items():
                mean[name] += value.double() / 8
    found = record_mean_sum(sd, blend, composition, 8)
    for path, terms in found.layers.items():
        name = f"{path}.weight"
        delta = sum_deltas(terms, own[name])
        assert torch.allclose(own[name].double() + delta.double(), mean[name], atol=1e-5)
    assert {name for name in own if not torch.allclose(own[name].double(), mean[name], atol=1e-6)} <= set(found.names)


def test_the_mean_delta_of_composite_equals_that_of_switch(sd: Base) -> None:
    turns = record_mean_sum(sd, two(sd), Composition(mode="switch", switch_every=1), 4)
    side_by_side = record_mean_sum(sd, two(sd), Composition(mode="composite"), 4)
    assert turns.layers.keys() == side_by_side.layers.keys()
    for path, terms in turns.layers.items():
        assert torch.allclose(sum_deltas(terms), sum_deltas(side_by_side.layers[path]), atol=1e-6)


def test_a_plain_sum_at_full_rank_is_exact_before_and_after_training(sd: Base) -> None:
    result = distill(sd, two(sd), Composition(), PROMPTS, make_config(rank=6))
    report = result.report
    assert max(report.plain_error, report.start_error, report.error) < 1e-6
    for path, terms in blend_sum(two(sd)).layers.items():
        assert torch.allclose(result.adapter.layers[path].delta(), sum_deltas(terms), atol=1e-5)


def test_all_kinds_of_layers_and_biases_are_distilled(sd: Base) -> None:
    blend = blend_of((everywhere(sd, 1), 0.7), (everywhere(sd, 2), -0.4))
    report = distill(sd, blend, Composition(), PROMPTS, make_config(rank=1000, steps=1)).report
    assert max(report.plain_error, report.start_error, report.error) < 1e-6


def test_np_lora_is_exact_at_full_rank(sd: Base) -> None:
    report = distill(sd, two(sd), Composition(mode="np-lora"), PROMPTS, make_config(rank=6)).report
    assert max(report.start_error, report.error) < 1e-6
    assert report.plain_error > 1e-3


@pytest.mark.parametrize("kind", ["switch", "composite", "schedule", "dora", "sum"])
def test_training_reduces_the_error_on_held_out_prompts(sd: Base, kind: str) -> None:
    blend, composition = two(sd), Composition()
    if kind in ("switch", "composite"):
        composition = SWITCH if kind == "switch" else Composition.model_validate({"mode": kind})
    elif kind == "schedule":
        blend = Blend(entries=(replace(blend.entries[0], weight=FADING), blend.entries[1]))
    elif kind == "dora":
        blend = dora(sd)
    result = distill(sd, blend, composition, PROMPTS, CONFIG)
    report = result.report
    assert report.error < 0.9 * report.start_error
    assert report.error < report.plain_error
    assert {layer.rank for layer in result.adapter.layers.values() if isinstance(layer, LoRALayer)} == {2}


def test_the_reported_error_matches_the_saved_file(sd: Base, tmp_path: Path) -> None:
    config = make_config(save_precision="float16", steps=2)
    result = distill(sd, two(sd), SWITCH, PROMPTS, config)
    save_adapter(result.adapter, tmp_path / "one.safetensors")
    adapter = load_adapter(tmp_path / "one.safetensors")
    assert {factor.dtype for layer in adapter.layers.values() for factor in layer.factors.values()} == {torch.float16}
    _, held_out = record_teacher(sd, two(sd), SWITCH, PROMPTS, config, "memory")
    rows = list(zip(held_out.latents, held_out.timesteps, held_out.texts, strict=True))

    def distance() -> float:
        predictions = torch.stack([predict(sd, *row) for row in rows])
        return float((predictions - held_out.predictions).double().square().mean())

    own = distance()
    with blended_weights(sd, blend_of((adapter, 1.0))):
        assert result.report.error == pytest.approx(distance() / own, rel=1e-3)
    with blended_weights(sd, two(sd)):
        assert distance() > 0
    settings = [GenerateConfig(prompt="a cat", num_inference_steps=2, width=16, height=16)]
    both = blend_of((adapter, 1.0), (random_adapter(sd, seed=5), 0.5))
    assert generate(sd, settings, both)[0].image.tobytes() != generate(sd, settings)[0].image.tobytes()


def test_factors_are_float32_on_a_bfloat16_base(sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=torch.bfloat16)
    result = distill(base, two(base), SWITCH, PROMPTS[:2], make_config(steps=4))
    assert {factor.dtype for layer in result.adapter.layers.values() for factor in layer.factors.values()} == {
        torch.float32
    }
    assert result.report.error < 0.9 * result.report.start_error
    assert base.pipe.unet.dtype == torch.bfloat16


def test_held_out_prompts_and_noise_are_not_trained_on(sd: Base) -> None:
    training, held_out = record_teacher(sd, two(sd), Composition(), PROMPTS, make_config(runs=2), "memory")
    assert not set(training.texts) & set(held_out.texts)
    assert (len(training), len(held_out)) == (3 * 2 * 2, 2 * 2)
    starts = torch.cat([training.latents, held_out.latents])[torch.cat([training.timesteps, held_out.timesteps]) > 400]
    assert len({tuple(latents.flatten()[:4].tolist()) for latents in starts}) == len(starts)


def refusals(base: Base) -> list[tuple[Blend, dict[str, Any], type[Exception], str]]:
    plain = random_adapter(base, seed=1)
    text = random_adapter(base, seed=1, unet=())
    worded = replace(plain, tokens={"<cat>": {"text_encoder": torch.zeros(1, 32)}})
    stranger = replace(plain, metadata=AdapterMetadata(name="large", family="sdxl"))
    zeros = {path: layer.with_factors({"up": 0 * layer.factors["up"]}) for path, layer in plain.layers.items()}
    silent = replace(plain, layers=zeros)
    placed = Blend(entries=(WeightedAdapter(adapter=plain, region=Region(box=(0, 0, 0.5, 1))),))
    return [
        (Blend(), {}, ConfigError, "give at least one adapter"),
        (blend_of((plain, 0.0)), {}, ConfigError, "give at least one adapter"),
        (placed, {}, ConfigError, "leave the region out"),
        (blend_of((worded, 1.0)), {}, ConfigError, r"textual-inversion embeddings \(<cat>\)"),
        (blend_of((stranger, 1.0)), {}, FamilyMismatchError, "large is an adapter for"),
        (blend_of((text, 1.0)), {}, ConfigError, "changes a linear or convolution layer of the UNet"),
        (
            blend_of((plain, BlendWeight(components={"unet": 0.0}))),
            {},
            ConfigError,
            "changes a linear or convolution layer of the UNet",
        ),
        (blend_of((silent, 1.0)), {}, ConfigError, "does not change the predictions"),
        (blend_of((plain, 1.0)), {"composition": Composition(mode="k-lora")}, ConfigError, "this blend has 1"),
        (blend_of((plain, 1.0)), {"prompts": ()}, ConfigError, "no prompts"),
        (blend_of((plain, 1.0)), {"prompts": ("a cat <lora:neon:1>",)}, ConfigError, "contains a <lora:...> tag"),
        (blend_of((plain, 1.0)), {"num_inference_steps": 1001}, ConfigError, "was trained with 1000 timesteps"),
        (blend_of((plain, 1e20)), {}, TrainingError, "lower the adapters' weights"),
        (blend_of((plain, 1.0)), {"learning_rate": 1e30}, TrainingError, "the loss at step 2"),
    ]


def test_unusable_blends_raise_clear_errors(sd: Base) -> None:
    for blend, changes, kind, message in refusals(sd):
        composition, prompts = changes.pop("composition", Composition()), changes.pop("prompts", PROMPTS)
        with pytest.raises(kind, match=message):
            distill(sd, blend, composition, prompts, make_config(**changes))
