"""Gates over frozen adapters: the gated forward pass equals the saved preset, and only the gates are trained."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.layers import FullLayer, LoRALayer
from lora_diffusion.cli import main
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendEntry, BlendPreset, BlendWeight, Region, Schedule
from lora_diffusion.config.routing import RouteConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.config.train import ObjectiveConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import BaseModelError, ConfigError, DatasetError, FamilyMismatchError, TrainingError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.in_place import blended_weights
from lora_diffusion.inference.parallel import parallel_blend
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base, module_at
from lora_diffusion.models.text_encoding import encode_prompts
from lora_diffusion.training.objectives.denoiser import Denoiser
from lora_diffusion.training.routing.gates import Gates, gated_base, time_bin_at
from lora_diffusion.training.routing.train import RouteResult, read_route, route
from tests.conftest import random_adapter

STEPS = 8
"""Denoising steps at which predictions are compared: two for each of four time bins."""
PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def two(base: Base) -> tuple[Adapter, Adapter]:
    """Return adapters of different ranks, with layers in all blocks, outside of them, and in the text encoder."""
    return random_adapter(base, seed=1, unet=("all",)), random_adapter(base, seed=2, rank=2)


def blend_of(*adapters: Adapter, weight: float = 1.0) -> Blend:
    return Blend(entries=tuple(WeightedAdapter(adapter=adapter, weight=weight) for adapter in adapters))


def with_weights(blend: Blend, weights: tuple[BlendWeight, ...]) -> Blend:
    return Blend(entries=tuple(replace(e, weight=w) for e, w in zip(blend.entries, weights, strict=True)))


def spread_gates(gates: Gates) -> None:
    """Set a different value for each adapter, block and time bin."""
    values = torch.linspace(-0.5, 1.5, gates.values.numel())
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    gates.values.data = values[order].reshape(gates.values.shape)


def timestep_at(step: int) -> int:
    """Return the training timestep, out of 1000, at the middle of a denoising step."""
    return round(1000 * (1 - (step + 0.5) / STEPS) - 0.5)


@torch.no_grad()
def predicted(base: Base, timesteps: list[int], prompt: str = "a sks cat") -> Tensor:
    """Return the UNet's predictions for the same noise at several timesteps, in one batch."""
    count = len(timesteps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(count, 1, 1, 1)
    context = encode_prompts(base, [prompt] * count, size_px=32)
    at = torch.tensor(timesteps)
    return base.pipe.unet(noise, at, encoder_hidden_states=context.hidden, added_cond_kwargs=context.added).sample


def losses_of(base: Base, timesteps: list[int], captions: list[str]) -> Tensor:
    """Return the training losses of random latents."""
    count = len(timesteps)
    latent, noise = torch.randn(2, count, 4, 8, 8)
    denoiser, at = Denoiser(base, ObjectiveConfig()), torch.tensor(timesteps)
    time_ids = torch.zeros(count, 6)
    return denoiser(latent=latent, noise=noise, input_noise=noise, timestep=at, captions=captions, time_ids=time_ids)


@pytest.fixture
def unchanged(sd: Base) -> Iterator[None]:
    """Fail a test that changes a parameter of the base, or leaves gradients, requires_grad or patched forwards."""
    parts = {name: getattr(sd.pipe, name) for name in ("unet", "text_encoder")}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    yield
    for name, part in parts.items():
        assert all(torch.equal(before[name][key], value) for key, value in part.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
        assert not any("forward" in vars(module) for module in part.modules())


@pytest.mark.usefixtures("unchanged")
def test_with_all_gates_1_the_forward_is_the_sum(sd: Base) -> None:
    blend = blend_of(*two(sd), weight=0.7)
    with gated_base(Gates(sd, blend, num_time_bins=3, init_value=1.0)):
        through_gates = predicted(sd, [900, 10])
    with blended_weights(sd, blend):
        assert torch.allclose(through_gates, predicted(sd, [900, 10]), atol=1e-4)
    assert not torch.allclose(through_gates, predicted(sd, [900, 10]), atol=1e-2)


@pytest.mark.usefixtures("unchanged")
def test_each_sample_is_predicted_with_the_weights_of_its_step(sd: Base) -> None:
    blend = blend_of(*two(sd), weight=0.7)
    gates = Gates(sd, blend, num_time_bins=4, init_value=0.3)
    spread_gates(gates)
    steps = [0, 1, 2, 5, 7]
    with gated_base(gates):
        together = predicted(sd, [timestep_at(step) for step in steps])
    saved = with_weights(blend, gates.to_weights())
    for step, prediction in zip(steps, together, strict=True):
        with blended_weights(sd, saved, DenoisingStep(index=step, total=STEPS)):
            alone = predicted(sd, [timestep_at(step)])[0]
        assert torch.allclose(prediction, alone, atol=1e-4), step
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_time_bins_are_equally_long_and_start_at_the_last_timestep() -> None:
    found = time_bin_at(torch.arange(1000), 4, 1000)
    assert found[[999, 750, 749, 500, 499, 250, 249, 0]].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for time_bins in (1, 3, 7):
        counts = time_bin_at(torch.arange(1000), time_bins, 1000).bincount()
        assert len(counts) == time_bins
        assert counts.max() - counts.min() <= 1


def test_saved_weights_contain_every_block_with_layers(sd: Base) -> None:
    blend = blend_of(*two(sd))
    gates = Gates(sd, blend, num_time_bins=2, init_value=0.25)
    everywhere, attention = gates.to_weights()
    assert isinstance(everywhere.blocks, dict)
    assert isinstance(attention.blocks, dict)
    assert set(everywhere.blocks) == {"BASE", *gates.blocks}
    assert set(attention.blocks) < set(everywhere.blocks)
    assert everywhere.blocks["BASE"] == 0.25
    assert everywhere.blocks["M00"] == Schedule(points=((0.0, 0.25), (0.5, 0.25)))
    outside = {path for path, factor in everywhere.modules if factor == 0.25}
    assert outside == {"unet.time_embedding.linear_1", "unet.time_embedding.linear_2", "unet.conv_out"}
    assert attention.modules == ()


@pytest.mark.usefixtures("unchanged")
def test_gradients_reach_the_gates_and_nothing_else(sd: Base) -> None:
    first, second = two(sd)
    gates = Gates(sd, blend_of(first, second), num_time_bins=2, init_value=0.5)
    with gated_base(gates):
        losses_of(sd, [999, 700, 500], ["a cat", "a sks dog", ""]).mean().backward()
    found = gates.values.grad
    assert found is not None
    assert (found[:, :, 1] == 0).all(), "no sample was in the second time bin"
    assert (found[0, :, 0] != 0).all()
    empty = [j for j, b in enumerate(gates.blocks) if b not in {gates.block_of(path) for path in second.paths}]
    assert empty
    assert (found[1, empty] == 0).all()
    assert [name for name, _ in gates.named_parameters()] == ["values"]


@pytest.mark.usefixtures("unchanged")
def test_the_base_is_restored_after_an_exception(sd: Base) -> None:
    with pytest.raises(KeyboardInterrupt), gated_base(Gates(sd, blend_of(*two(sd)), num_time_bins=2, init_value=1.0)):
        raise KeyboardInterrupt


def test_previously_patched_forwards_are_restored(sd: Base) -> None:
    other = random_adapter(sd, seed=5)
    with parallel_blend(sd, blend_of(other)):
        before, prediction = module_at(sd, PATH).forward, predicted(sd, [500])
        with gated_base(Gates(sd, blend_of(*two(sd)), num_time_bins=2, init_value=1.0)):
            assert not torch.allclose(prediction, predicted(sd, [500]), atol=1e-2)
        assert module_at(sd, PATH).forward is before
        assert torch.equal(prediction, predicted(sd, [500]))


@pytest.mark.usefixtures("unchanged")
def test_unsupported_layers_and_weights_raise_errors(sd: Base) -> None:
    plain = random_adapter(sd, seed=1)
    full = FullLayer(diff=torch.ones(plain.layers[PATH].weight_shape))
    convolution = "unet.mid_block.resnets.0.conv1"
    out, inner = module_at(sd, convolution).weight.shape[:2]  # type: ignore[index]
    core = LoRALayer(
        down=torch.ones(2, inner, 1, 1), up=torch.ones(out, 2, 1, 1), mid=torch.ones(2, 2, 3, 3), alpha=1.0
    )
    for path, layer, kind in ((PATH, full, "full"), (convolution, core, "LoRA with a Tucker core")):
        with pytest.raises(ConfigError, match=f"1 of other kinds \\({kind}; first: {path}\\)"):
            Gates(sd, blend_of(Adapter(layers={**plain.layers, path: layer})), num_time_bins=2, init_value=1.0)
    text = random_adapter(sd, seed=1, unet=())
    with pytest.raises(ConfigError, match="no gates to train"):
        Gates(sd, blend_of(text), num_time_bins=2, init_value=1.0)
    with pytest.raises(ConfigError, match="give a number"):
        Gates(sd, blend_of(plain, weight=0.0), num_time_bins=2, init_value=1.0)
    regional = WeightedAdapter(adapter=plain, region=Region(box=(0, 0, 0.5, 1)))
    with pytest.raises(ConfigError, match="leave the region out"):
        Gates(sd, Blend(entries=(regional,)), num_time_bins=2, init_value=1.0)


@pytest.fixture
def folder(tmp_path: Path, sd: Base) -> Path:
    """Make a folder with two captioned images, two adapters for the random base, and a settings file."""
    (tmp_path / "data").mkdir()
    for name, color in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
        Image.new("RGB", (32, 32), color).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a sks picture {name}")
    for name, adapter in zip(("one", "two"), two(sd), strict=True):
        save_adapter(adapter, tmp_path / "adapters" / f"{name}.safetensors")
    (tmp_path / "route.toml").write_text(
        f"""
        base = "{sd.folder}"
        data = "data"
        output = "out/mixture.json"
        steps = 2
        batch_size = 4
        resolution = 32
        num_time_bins = 2
        [[adapters]]
        path = "adapters/one.safetensors"
        weight = 0.8
        [[adapters]]
        path = "adapters/two.safetensors"
        """
    )
    return tmp_path


def read(result: RouteResult) -> BlendPreset:
    return BlendPreset.from_json(result.path.read_text(), source=str(result.path))


@pytest.mark.usefixtures("unchanged")
def test_a_run_saves_a_preset_that_can_be_sampled_with(folder: Path, sd: Base) -> None:
    result = route(read_route(folder / "route.toml"))
    preset = read(result)
    assert preset == result.preset
    assert [(e.path, e.name) for e in preset.adapters] == [
        ("../adapters/one.safetensors", "random-1"),
        ("../adapters/two.safetensors", "random-2"),
    ]
    loaded = [load_adapter(result.path.parent / e.path) for e in preset.adapters]
    assert [e.hash for e in preset.adapters] == [adapter.hash for adapter in loaded]
    weights = [e.weight for e in preset.adapters]
    assert all(isinstance(w, BlendWeight) for w in weights)
    assert [w.value for w in weights if isinstance(w, BlendWeight)] == [0.8, 1.0]
    blend = Blend(entries=tuple(WeightedAdapter(adapter=a, weight=w) for a, w in zip(loaded, weights, strict=True)))
    assert blend.is_scheduled
    assert (
        len(generate(sd, [GenerateConfig(prompt="a sks cat", num_inference_steps=4, width=32, height=32)], blend)) == 1
    )
    assert [p.name for p in result.path.parent.iterdir()] == ["mixture.json"]


def test_the_same_seed_gives_the_same_file(folder: Path) -> None:
    files: list[bytes] = []
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        changes = {"output": folder / name / "mixture.json", "seed": seed, "batch_size": 8}
        files.append(route(read_route(folder / "route.toml", changes)).path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_penalty_keeps_gates_near_their_initial_value(folder: Path) -> None:
    moved: list[float] = []
    for penalty in (0.0, 1e6):
        changes = {"output": folder / "mixture.json", "steps": 6, "batch_size": 2, "penalty": penalty}
        result = route(read_route(folder / "route.toml", changes))
        moved.append(max(abs(gate - 0.5) for entry in result.preset.adapters for gate in gates_of(entry.weight)))
    free, held = moved
    assert held < 0.5 * free


def test_a_bfloat16_base_trains_float32_gates(sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=torch.bfloat16)
    gates = Gates(base, blend_of(*two(base)), num_time_bins=1, init_value=1.0)
    with gated_base(gates):
        losses_of(base, [500], ["a cat"]).mean().backward()
    assert gates.values.dtype == torch.float32
    assert gates.values.grad is not None
    assert (gates.values.grad[0] != 0).all()


def test_the_command_prints_the_path_of_the_preset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", str(folder / "route.toml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert Path(facts["preset"]) == folder / "out" / "mixture.json"
    assert facts["first_loss"] > 0
    assert main(["route", str(folder / "route.toml"), "--set", "step=3"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err


def test_invalid_input_raises_a_clear_error_and_writes_nothing(folder: Path, sd: Base) -> None:
    metadata = AdapterMetadata(name="large", family="sdxl")
    save_adapter(Adapter(layers=random_adapter(sd, seed=1).layers, metadata=metadata), folder / "large.safetensors")
    (folder / "empty").mkdir()
    one = {"path": str(folder / "adapters" / "one.safetensors")}
    bad: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"adapters": ()}, ConfigError, "'adapters' is \\(\\)"),
        ({"data": ()}, ConfigError, "'data' is \\(\\)"),
        ({"output": folder / "out" / "mixture.safetensors"}, ConfigError, "does not end in .json"),
        ({"base": str(folder / "nowhere")}, BaseModelError, "no such folder"),
        ({"base": str(folder / "data")}, BaseModelError, "data"),
        ({"data": folder / "empty"}, DatasetError, "no images found"),
        ({"adapters": ({"path": str(folder / "large.safetensors")},)}, FamilyMismatchError, "large is an adapter for"),
        ({"adapters": ({**one, "hash": "0" * 64},)}, ConfigError, "differs from the recorded hash"),
        ({"adapters": ({**one, "weight": {"value": 0.5}},)}, ConfigError, "give a number"),
        ({"learning_rate": 1e30}, TrainingError, "loss at step"),
    ]
    for changes, kind, message in bad:
        with pytest.raises(kind, match=message):
            route(read_route(folder / "route.toml", changes))
        assert not (folder / "out").exists(), changes


def test_the_example_settings_are_valid_and_their_files_exist() -> None:
    config = read_route(sample_data_folder() / "configs" / "route-neon-gloop.toml")
    assert all(folder.is_dir() for folder in config.data)
    assert all(Path(entry.path).is_file() for entry in config.adapters)
    assert config.init_value == "average"


@pytest.mark.slow
def test_the_adapter_that_matches_the_images_gets_the_larger_gates(tmp_path: Path) -> None:
    """Train on images in the neon style, with the adapters neon and ink at equal initial weights."""
    shutil.copytree(sample_data_folder() / "styles" / "neon", tmp_path / "neon")
    names = ("neon", "ink")
    config = validate(
        RouteConfig,
        {
            "data": tmp_path / "neon",
            "output": tmp_path / "mixture.json",
            "adapters": [
                BlendEntry(path=str(sample_data_folder() / "adapters" / f"{name}.safetensors")) for name in names
            ],
            "steps": 40,
            "batch_size": 3,
        },
        source="test",
    )
    result = route(config)
    neon, ink = (mean(gates_of(entry.weight)) for entry in read(result).adapters)
    assert neon > 0.55 > 0.45 > ink
    assert result.last_loss < 0.5 * result.first_loss


def gates_of(weight: object) -> list[float]:
    """Return the gates of all blocks and time bins."""
    assert isinstance(weight, BlendWeight)
    assert isinstance(weight.blocks, dict)
    return [gate for factor in weight.blocks.values() if isinstance(factor, Schedule) for _, gate in factor.points]
