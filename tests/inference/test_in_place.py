"""Weight patches: the weights depend on base and blend only, and undo restores the original weights bit for bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter, blend_sum
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.combine.exact_sum import combine
from lora_diffusion.config.preset import BlendWeight, Region
from lora_diffusion.errors import AdapterFormatError, ConfigError, LoRADiffusionError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.in_place import (
    WeightPatch,
    blended_weights,
    weight_at,
    weight_patch,
)
from lora_diffusion.inference.parallel import parallel_patch
from lora_diffusion.models.load import Base, load_base
from tests.conftest import random_adapter
from tests.helpers.blends import ONE, PATH, blend_of, fresh, mixed_adapter, parameters, same


def test_every_kind_of_layer_is_base_plus_delta(sd: Base, before: dict[str, Tensor]) -> None:
    blend = blend_of((mixed_adapter(sd, 1), 0.7), (mixed_adapter(sd, 2), -0.4))
    live = fresh(sd, blend)
    for path, terms in blend_sum(blend).layers.items():
        own = before[f"{path}.weight"]
        assert torch.allclose(live[f"{path}.weight"], own + sum_deltas(terms, own), atol=1e-6)
    own = before[f"{PATH}.bias"]
    biases = [entry.adapter.biases[PATH] for entry in blend.entries]
    assert torch.allclose(live[f"{PATH}.bias"], own + 0.7 * biases[0] - 0.4 * biases[1], atol=1e-6)


@pytest.mark.usefixtures("before")
def test_after_200_random_blends_failures_included_the_base_is_bit_identical(sd: Base) -> None:
    rng = random.Random(0)
    good = [mixed_adapter(sd, seed) for seed in range(4)] + [random_adapter(sd, seed=9, unet=("all",))]
    broken = Adapter(layers={PATH: LoRALayer(down=torch.full((1, 64), torch.nan), up=torch.ones(64, 1), alpha=1.0)})
    stranger = Adapter(layers={"unet.nowhere": LoRALayer(down=torch.ones(1, 4), up=torch.ones(4, 1), alpha=1.0)})
    failures = 0
    with weight_patch(sd) as patch:
        for _ in range(200):
            chosen = rng.sample([*good, broken, stranger], rng.randint(0, 3))
            blend = blend_of(*((adapter, rng.choice([-1.5, 0.0, 0.3, 1.0])) for adapter in chosen))
            previous = {name: patch.live[name].clone() for name in patch.applied}
            try:
                patch.apply(blend)
            except LoRADiffusionError:
                failures += 1
                assert all(torch.equal(patch.live[name], value) for name, value in previous.items())
        last = blend_of((good[0], 0.5), (good[4], 1.0))
        patch.apply(last)
        after_all = parameters(sd)
    assert 20 < failures < 180
    assert same(after_all, fresh(sd, last))


@pytest.mark.usefixtures("before")
def test_changed_coefficients_give_bit_for_bit_what_a_new_patch_gives(sd: Base) -> None:
    adapters = [mixed_adapter(sd, seed) for seed in range(4)]
    with weight_patch(sd) as patch:
        patch.apply(blend_of(*((adapter, 1.0) for adapter in adapters)))
        stacks = dict(patch.stacks)
        moved = blend_of(*zip(adapters, (0.3, 1.0, -2.0, 0.7), strict=True))
        patch.apply(moved)
        assert all(patch.stacks[path] is stack for path, stack in stacks.items()), "the factors were stacked again"
        live = parameters(sd)
    assert same(live, fresh(sd, moved))


@pytest.mark.usefixtures("before")
def test_changing_the_blend_writes_only_parameters_whose_terms_differ(sd: Base) -> None:
    first, second = random_adapter(sd, seed=1), random_adapter(sd, seed=2, text_encoders=())
    with weight_patch(sd) as patch:
        patch.apply(blend_of((first, 1.0)))
        versions = {name: tensor._version for name, tensor in patch.live.items()}
        patch.apply(blend_of((second, 0.5), (first, 1.0)))
        written = {name for name, tensor in patch.live.items() if tensor._version != versions.get(name)}
    assert written == {f"{path}.weight" for path in second.layers}


@pytest.mark.usefixtures("before")
def test_ctrl_c_restores_the_base(sd: Base) -> None:
    with pytest.raises(KeyboardInterrupt), blended_weights(sd, blend_of((mixed_adapter(sd, 1), 1.0))):
        raise KeyboardInterrupt


def test_an_interrupted_write_is_undone(sd: Base, before: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    write_weight = WeightPatch.write_weight

    def interrupted(self: WeightPatch, path: str, terms: tuple[tuple[float, LoRALayer], ...]) -> None:
        write_weight(self, path, terms)
        if path == PATH:
            raise KeyboardInterrupt

    monkeypatch.setattr(WeightPatch, "write_weight", interrupted)
    with weight_patch(sd) as patch:
        with pytest.raises(KeyboardInterrupt):
            patch.apply(blend_of((random_adapter(sd, seed=1, unet=("all",)), 1.0)))
        assert same(before, parameters(sd))


@pytest.mark.usefixtures("before")
def test_an_adapter_with_nan_is_refused_and_changes_nothing(sd: Base) -> None:
    good = random_adapter(sd, seed=1)
    layer = good.layers[ONE]
    assert isinstance(layer, LoRALayer)
    bad = Adapter(layers={**good.layers, ONE: replace(layer, up=torch.full_like(layer.up, torch.nan))})
    with weight_patch(sd) as patch:
        patch.apply(blend_of((good, 1.0)))
        previous = parameters(sd)
        with pytest.raises(AdapterFormatError, match="contains NaN or infinity"):
            patch.apply(blend_of((good, 1.0), (bad, 0.1)))
        assert same(previous, parameters(sd))


def test_a_half_precision_base_is_restored_after_an_overflow(sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=torch.float16)
    original = parameters(base)
    with weight_patch(base) as patch:
        with pytest.raises(ConfigError, match=r"beyond the range of torch\.float16; lower the weights"):
            patch.apply(blend_of((random_adapter(base, seed=1), 1e6)))
        assert same(original, parameters(base))
        patch.apply(blend_of((random_adapter(base, seed=1), 1.0)))
    assert same(original, parameters(base))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_blend_is_rounded_once(sd: Base, sd_folder: Path, precision: torch.dtype) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=precision)
    blend = blend_of(*((random_adapter(base, seed=seed), 0.2) for seed in range(5)))
    with blended_weights(base, blend):
        for path, terms in blend_sum(blend).layers.items():
            own = weight_at(sd, path).to(precision)
            exact = own.double() + sum_deltas(terms).double().reshape(own.shape)
            spacing = torch.finfo(precision).eps * exact.abs().clamp(min=torch.finfo(precision).tiny)
            assert bool(((weight_at(base, path).double() - exact).abs() <= 0.51 * spacing).all())


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_the_base_file_can_be_the_backup(sd_folder: Path, precision: torch.dtype) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=precision)
    original = parameters(base)
    blend = blend_of((mixed_adapter(base, 1), 0.5))
    with blended_weights(base, blend, backup="file"):
        from_file = parameters(base)
    assert same(original, parameters(base))
    assert same(from_file, fresh(base, blend))


def test_a_base_that_was_changed_after_loading_has_no_backup_on_disk(sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    weight_at(base, ONE).add_(1)
    with (
        pytest.raises(ConfigError, match="keep the backup in memory instead"),
        blended_weights(base, blend_of((random_adapter(base, seed=1), 1.0)), backup="file"),
    ):
        pass


def test_blocks_with_factor_0_are_not_changed(sd: Base, before: dict[str, Tensor]) -> None:
    adapter = random_adapter(sd, seed=1, unet=("all",))
    live = fresh(sd, blend_of((adapter, BlendWeight(value=0.8, blocks={"M00": 0.0, "BASE": 0.5}))))
    assert torch.equal(live[f"{PATH}.weight"], before[f"{PATH}.weight"])
    assert torch.equal(live[f"{ONE}.weight"], fresh(sd, blend_of((adapter, 0.4)))[f"{ONE}.weight"])
    other = "unet.down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(live[other], fresh(sd, blend_of((adapter, 0.8)))[other])


@contextmanager
def peft_pipeline(base: Base, files: list[Path], weights: list[float]) -> Iterator[object]:
    """Load the same base and adapters with diffusers and PEFT."""
    kind = StableDiffusionXLPipeline if len(base.layout.text_layers) == 2 else StableDiffusionPipeline
    pipe = kind.from_pretrained(base.folder, safety_checker=None) if kind is StableDiffusionPipeline else None
    pipe = pipe or kind.from_pretrained(base.folder, add_watermarker=False)
    for file in files:
        pipe.load_lora_weights(file, adapter_name=file.stem)
    pipe.set_adapters([file.stem for file in files], weights)
    yield pipe


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.filterwarnings("ignore")
def test_pixels_are_those_of_peft_with_set_adapters(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Base = request.getfixturevalue(family)
    adapters = [random_adapter(base, seed=seed, rank=seed + 1, alpha=3.0) for seed in (1, 2)]
    files = [tmp_path / f"adapter{i}.safetensors" for i in range(2)]
    for adapter, file in zip(adapters, files, strict=True):
        save_adapter(adapter, file)
    options = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np", "width": 32, "height": 32}
    with peft_pipeline(base, files, [0.7, -0.4]) as pipe:
        theirs = pipe(**options, generator=torch.Generator().manual_seed(0)).images  # type: ignore[operator]
    with blended_weights(base, blend_of((adapters[0], 0.7), (adapters[1], -0.4))):
        ours = base.pipe(**options, generator=torch.Generator().manual_seed(0)).images
    assert abs(theirs - ours).max() < 1e-4


def test_ctrl_c_during_undo_is_raised_after_it(
    sd: Base, before: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore, calls = WeightPatch.restore, []

    def interrupted(self: WeightPatch, name: str) -> None:
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        restore(self, name)

    monkeypatch.setattr(WeightPatch, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), blended_weights(sd, blend_of((random_adapter(sd, seed=1), 1.0))):
        pass
    assert same(before, parameters(sd))
    with blended_weights(sd, Blend()):
        pass


def test_autocast_changes_no_bit_of_what_is_written(sd: Base) -> None:
    blend = blend_of((random_adapter(sd, seed=1), 0.7))
    plain = fresh(sd, blend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(plain, fresh(sd, blend))


def test_adapters_stored_in_different_types_sum(sd: Base) -> None:
    adapter = random_adapter(sd, seed=1)
    types = (torch.float8_e4m3fn, torch.float16, torch.float32)
    layer = adapter.layers[ONE]
    cast = [
        Adapter(layers={ONE: layer.with_factors({name: f.to(dtype) for name, f in layer.factors.items()})})
        for dtype in types
    ]
    live = fresh(sd, blend_of(*((one, 0.5) for one in cast)))[f"{ONE}.weight"]
    expected = weight_at(sd, ONE) + sum(0.5 * one.layers[ONE].delta() for one in cast)
    assert torch.allclose(live, expected, atol=1e-6)


def test_bases_that_share_a_model_share_the_check_for_open_patches(sd: Base) -> None:
    other_base = replace(sd, merged=("another hash",))
    other_pipe = replace(sd, pipe=type(sd.pipe)(**sd.pipe.components, requires_safety_checker=False))
    for other in (other_base, other_pipe):
        with weight_patch(sd):
            with pytest.raises(ConfigError, match="a blend is applied to the weights of this base already"):
                weight_patch(other).__enter__()
            with parallel_patch(other), pytest.raises(ConfigError, match="a parallel patch is open on this base"):
                parallel_patch(sd).__enter__()
        with weight_patch(other), parallel_patch(sd):
            pass


def test_a_weight_patch_refuses_regions(sd: Base) -> None:
    entry = WeightedAdapter(adapter=random_adapter(sd, seed=1), region=Region(box=(0, 0, 0.5, 1)))
    with pytest.raises(ConfigError, match="acts in a region"), blended_weights(sd, Blend(entries=(entry,))):
        pass


def test_a_pattern_that_matches_no_module_is_refused(sd: Base) -> None:
    with pytest.raises(ConfigError, match="matches no module of the adapter"):
        blend_of((random_adapter(sd, seed=1), BlendWeight(modules=(("*.attnn2.*", 0.0),))))


def test_combining_keeps_biases_and_embeddings(sd: Base) -> None:
    plain = random_adapter(sd, seed=1)
    biased = Adapter(layers=plain.layers, biases={PATH: torch.ones(64)})
    one = combine(blend_of((biased, 0.5), (biased, 1.0)), AdapterMetadata())
    assert torch.equal(one.biases[PATH], torch.full((64,), 1.5))
    worded = Adapter(layers=plain.layers, tokens={"sks": {"text_encoder": torch.ones(1, 32)}})
    both = combine(blend_of((worded, 0.5)), AdapterMetadata())
    assert torch.equal(both.tokens["sks"]["text_encoder"], torch.ones(1, 32))
