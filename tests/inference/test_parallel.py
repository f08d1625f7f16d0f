"""Parallel patches: the same outputs as weight patches for each kind of layer, and a blend of its own per sample."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, blend_sum
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.deltas import sum_deltas
from lora_diffusion.adapters.layers import DoRALayer, FullLayer, LoHaLayer, LoRALayer
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendWeight, Composition, Schedule
from lora_diffusion.errors import AdapterFormatError, ConfigError
from lora_diffusion.inference.in_place import blend_rounding_error, blended_weights, weight_at, weight_patch
from lora_diffusion.inference.parallel import parallel_blend, parallel_patch
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base, load_base, module_at
from lora_diffusion.models.text_encoding import encode_prompts
from lora_diffusion.workflows.images.generate import warn_about_rounding
from lora_diffusion.workflows.images.request import GenerationRequest
from tests.conftest import random_adapter
from tests.helpers.blends import PATH, blend_of, mixed_adapter, parameters, same

LATENTS = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a red boat", "nothing"]


@torch.no_grad()
def predict(base: Base, rows: slice = slice(None)) -> Tensor:
    """Encode some of four prompts and compute the UNet's output for them."""
    context = encode_prompts(base, PROMPTS[rows], size_px=32)
    options = {} if context.added is None else {"added_cond_kwargs": context.added}
    dtype = base.pipe.unet.dtype
    return base.pipe.unet(LATENTS[rows].to(dtype), 7, context.hidden, **options).sample.float()


def everywhere(base: Base, seed: int) -> Adapter:
    """Create an adapter with every kind of layer on linear modules, convolutions and norms, with biases."""
    adapter = mixed_adapter(base, seed)
    wide = random_adapter(base, seed=seed + 50, unet=("all",), text_encoders=("all",))
    rng = torch.Generator().manual_seed(seed)
    layers = {**wide.layers, **adapter.layers}
    convolution = "unet.down_blocks.0.resnets.0.conv1"
    out, inner, *kernel = weight_at(base, convolution).shape
    half = torch.randn(out, 2, generator=rng) * 0.1, torch.randn(2, inner * 9, generator=rng) * 0.1
    layers[convolution] = LoHaLayer(w1_a=half[0], w1_b=half[1], w2_a=half[0], w2_b=half[1], alpha=2.0)
    for norm in ("unet.down_blocks.0.resnets.0.norm1", "unet.mid_block.attentions.0.transformer_blocks.0.norm1"):
        layers[norm] = FullLayer(diff=torch.randn(weight_at(base, norm).shape, generator=rng) * 0.1)
    assert kernel == [3, 3]
    biases = {**adapter.biases, convolution: torch.randn(out, generator=rng) * 0.1}
    biases["unet.down_blocks.0.resnets.0.norm1"] = torch.randn(inner, generator=rng) * 0.1
    return Adapter(layers=layers, biases=biases, metadata=adapter.metadata)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_parallel_patch_agrees_with_a_weight_patch(family: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(family)
    blend = blend_of((everywhere(base, 1), 0.6), (everywhere(base, 2), -0.3), (random_adapter(base, seed=3), 1.2))
    bare = predict(base)
    with blended_weights(base, blend):
        in_place = predict(base)
    with parallel_blend(base, blend):
        parallel = predict(base)
    assert (in_place - bare).abs().max() > 0.05
    assert torch.allclose(parallel, in_place, atol=1e-4)
    assert torch.equal(predict(base), bare)


def test_each_sample_of_a_batch_has_its_own_blend(sd: Base) -> None:
    one, two, three = everywhere(sd, 1), everywhere(sd, 2), random_adapter(sd, seed=3, rank=7)
    blends = [blend_of((one, 1.0)), blend_of((two, 0.5), (three, -1.0)), Blend(), blend_of((one, -0.4), (two, 0.2))]
    with parallel_blend(sd, *blends):
        together = predict(sd)
    for row, blend in enumerate(blends):
        with blended_weights(sd, blend):
            assert torch.allclose(predict(sd, slice(row, row + 1)), together[row : row + 1], atol=1e-4)


def test_two_blends_alternate_in_a_batch_of_four(sd: Base) -> None:
    """With guidance, the unconditional samples come first, so blend i applies to the samples i and i + n."""
    first, second = blend_of((random_adapter(sd, seed=1), 1.0)), blend_of((random_adapter(sd, seed=2), 1.0))
    with parallel_blend(sd, first, second):
        two = predict(sd)
    with parallel_blend(sd, first, second, first, second):
        assert torch.allclose(two, predict(sd), atol=1e-5)


def test_a_batch_that_the_blends_do_not_divide_is_refused(sd: Base) -> None:
    blends = [blend_of((random_adapter(sd, seed=seed), 1.0)) for seed in range(3)]
    with pytest.raises(ConfigError, match="cannot apply 3 blends to a batch of 4"), parallel_blend(sd, *blends):
        predict(sd)


def test_the_weights_stay_unchanged_and_the_forwards_are_restored(sd: Base) -> None:
    before, forwards = parameters(sd), [id(m.forward.__func__) for m in sd.pipe.unet.modules()]
    with pytest.raises(RuntimeError, match="inside"), parallel_blend(sd, blend_of((everywhere(sd, 1), 1.0))):
        assert same(before, parameters(sd))
        raise RuntimeError("inside")
    assert same(before, parameters(sd))
    assert forwards == [id(m.forward.__func__) for m in sd.pipe.unet.modules()]
    assert not any("forward" in vars(module) for module in sd.pipe.unet.modules())


def test_a_broken_adapter_changes_nothing(sd: Base) -> None:
    broken = Adapter(layers={PATH: LoRALayer(down=torch.full((1, 64), torch.nan), up=torch.ones(64, 1), alpha=1.0)})
    good = blend_of((random_adapter(sd, seed=1), 1.0))
    with parallel_patch(sd) as patch:
        patch.apply([good])
        previous = predict(sd)
        with pytest.raises(AdapterFormatError, match="NaN"):
            patch.apply([good, blend_of((broken, 1.0))])
        assert torch.equal(predict(sd), previous)


def test_going_from_blend_to_blend_gives_the_last_one(sd: Base) -> None:
    one, two = everywhere(sd, 1), random_adapter(sd, seed=2)
    with parallel_patch(sd) as patch:
        for blend in (blend_of((one, 1.0)), blend_of((two, 0.5)), Blend(), blend_of((one, 0.3), (two, 0.5))):
            patch.apply([blend])
            live = predict(sd)
    with parallel_blend(sd, blend_of((one, 0.3), (two, 0.5))):
        assert torch.equal(live, predict(sd))


def test_a_parallel_patch_follows_a_schedule(sd: Base) -> None:
    adapter = random_adapter(sd, seed=1, text_encoders=())
    late = BlendWeight(schedule=Schedule(points=((0.0, 0.0), (0.5, 1.0))))
    bare = predict(sd)
    with parallel_blend(sd, blend_of((adapter, late)), denoising_step=DenoisingStep(index=0, total=4)):
        assert torch.equal(predict(sd), bare)
    with (
        parallel_blend(sd, blend_of((adapter, late)), denoising_step=DenoisingStep(index=3, total=4)),
        weight_patch(sd),
    ):
        later = predict(sd)
    with parallel_blend(sd, blend_of((adapter, 1.0))):
        assert torch.equal(predict(sd), later)


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args=(), kwargs=None) -> object:  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(base: Base) -> int:
    with Operations() as counted:
        predict(base)
    return counted.count


def test_operations_do_not_grow_with_the_number_of_adapters(sd: Base) -> None:
    bare = operations(sd)
    adapters = [random_adapter(sd, seed=seed) for seed in range(8)]
    counts = []
    for number in (1, 8):
        with parallel_blend(sd, blend_of(*((adapter, 0.1) for adapter in adapters[:number]))):
            counts.append(operations(sd))
        with blended_weights(sd, blend_of(*((adapter, 0.1) for adapter in adapters[:number]))):
            assert operations(sd) == bare
    assert counts[0] == counts[1] <= 1.6 * bare


class Int8Linear(nn.Linear):
    """A linear module whose weight is quantized to int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = linear.weight.data.abs().amax(dim=1, keepdim=True) / 127
        codes = (linear.weight.data / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def quantize(base: Base) -> None:
    for name, module in list(base.pipe.unet.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(base.pipe.unet.get_submodule(parent), leaf, Int8Linear(module))


def test_a_quantized_base_accepts_a_parallel_patch(sd: Base, sd_folder: object) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    quantize(base)
    blend = blend_of((random_adapter(sd, seed=1), 0.8))
    bare = predict(base)
    with parallel_blend(base, blend):
        moved = predict(base)
    for path in (p for p in blend.entries[0].adapter.layers if p.startswith("unet.")):
        module = module_at(base, path)
        assert isinstance(module, Int8Linear)
        whole = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        whole.weight.data = module.weight.float() * module.scale
        whole.bias = module.bias
        parent, _, leaf = path.removeprefix("unet.").rpartition(".")
        setattr(base.pipe.unet.get_submodule(parent), leaf, whole)
    with parallel_blend(base, blend):
        assert torch.allclose(predict(base), moved, atol=1e-5)
    assert (moved - bare).abs().max() > 0.01


def test_a_quantized_base_refuses_a_weight_patch_and_dora(sd: Base, sd_folder: object) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    quantize(base)
    with (
        pytest.raises(ConfigError, match="quantized"),
        blended_weights(base, blend_of((random_adapter(sd, seed=1), 0.8))),
    ):
        pass
    plain = random_adapter(sd, seed=1)
    path = next(path for path in plain.layers if path.startswith("unet."))
    layer = plain.layers[path]
    assert isinstance(layer, LoRALayer)
    dora = DoRALayer(inner=layer, magnitude=torch.ones(layer.up.shape[0], 1))
    adapter = Adapter(layers={path: dora}, metadata=plain.metadata)
    with (
        pytest.raises(ConfigError, match="DoRA needs the base's own weight"),
        parallel_blend(base, blend_of((adapter, 1.0))),
    ):
        pass


def test_a_parallel_patch_in_bfloat16_keeps_deltas_that_rounding_would_lose(sd: Base, sd_folder: object) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=torch.bfloat16)
    blend = blend_of((random_adapter(sd, seed=1, text_encoders=()), 0.004))
    path = next(iter(blend.entries[0].adapter.layers))
    bare = weight_at(base, path).clone()
    with blended_weights(base, blend):
        unchanged = (weight_at(base, path) == bare).float().mean()
    assert unchanged > 0.3
    x = torch.randn(1, 8, bare.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    module = module_at(base, path)
    layer = blend.entries[0].adapter.layers[path]
    exact = nn.functional.linear(x.float(), 0.004 * layer.delta())
    with torch.no_grad():
        plain = module(x).float()
        with parallel_blend(base, blend):
            found = module(x).float() - plain
    spacing = 2.0**-8 * plain.abs().clamp(min=1e-3)
    assert bool(((found - exact).abs() <= 2 * spacing).all())


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.06)])
def test_in_half_precision_both_patches_agree_up_to_rounding(
    sd_folder: object, precision: torch.dtype, tolerance: float
) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=precision)
    blend = blend_of((random_adapter(base, seed=1), 0.6), (random_adapter(base, seed=2), -0.3))
    bare = predict(base)
    with blended_weights(base, blend):
        in_place = predict(base)
    with parallel_blend(base, blend):
        parallel = predict(base)
    assert (in_place - bare).abs().max() > 4 * tolerance
    assert (parallel - in_place).abs().max() < tolerance


def test_a_note_warns_when_rounding_would_lose_most_of_an_adapter(sd: Base, sd_folder: object) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=torch.bfloat16)
    gentle, strong = (blend_of((random_adapter(sd, seed=1), weight)) for weight in (0.004, 2.0))
    plan = GenerationRequest(base=base.name, entries=(), settings=GenerateConfig(prompt="a cat"))
    for blend in (gentle, strong):
        total = blend_sum(blend)
        lost = delta = 0.0
        with blended_weights(base, blend):
            for path, terms in total.layers.items():
                own = weight_at(sd, path).bfloat16().double()
                change = sum_deltas(terms).double().reshape(own.shape)
                lost += float((weight_at(base, path).double() - own - change).square().sum())
                delta += float(change.square().sum())
        assert blend_rounding_error(base, total) == pytest.approx((lost / delta) ** 0.5, rel=1e-3)
    notes = warn_about_rounding(base, gentle, plan)
    assert len(notes) == 1
    assert "rounding to bfloat16 loses" in notes[0]
    assert "--parallel" in notes[0]
    assert warn_about_rounding(base, strong, plan) == []
    exact = replace(plan, composition=Composition(parallel=True))
    assert warn_about_rounding(base, gentle, exact) == []
    assert warn_about_rounding(sd, gentle, plan) == []


def test_the_rounding_error_counts_biases(sd_folder: object) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"), precision=torch.bfloat16)
    own = module_at(base, PATH).bias.data
    change = torch.full_like(own, 1e-3, dtype=torch.float32)
    exact = own.float() + change
    expected = float((exact.bfloat16().float() - exact).norm() / change.norm())
    blend = blend_of((Adapter(layers={}, biases={PATH: change}), 1.0))
    assert blend_rounding_error(base, blend_sum(blend)) == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_a_second_parallel_patch_is_refused_and_forwards_of_other_tools_are_restored(sd: Base) -> None:
    blend = blend_of((random_adapter(sd, seed=1), 1.0))
    path = next(path for path in blend.entries[0].adapter.layers if path.startswith("unet."))
    module = module_at(sd, path)
    own = module.forward

    def hook(x: Tensor) -> Tensor:
        return own(x)

    module.forward = hook  # type: ignore[method-assign]
    try:
        with parallel_blend(sd, blend):
            with (
                pytest.raises(ConfigError, match="a parallel patch is open on this base already"),
                parallel_blend(sd, blend),
            ):
                pass
            with pytest.raises(ConfigError, match="recipe would not record"):
                generate(sd, [GenerateConfig(prompt="a cat", steps=1, width=32, height=32)])
        assert module.forward is hook
    finally:
        del module.forward


def test_a_quantized_text_encoder_refuses_a_weight_patch(sd: Base, sd_folder: object) -> None:
    base = load_base(str(sd_folder), device=torch.device("cpu"))
    encoder = base.pipe.text_encoder
    for name, module in list(encoder.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(encoder.get_submodule(parent), leaf, Int8Linear(module))
    with (
        pytest.raises(ConfigError, match="quantized"),
        blended_weights(base, blend_of((random_adapter(sd, seed=1), 0.8))),
    ):
        pass


def test_a_parallel_patch_works_under_autocast(sd: Base) -> None:
    blend = blend_of((random_adapter(sd, seed=1), 0.8))
    with parallel_blend(sd, blend):
        plain = predict(sd)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (predict(sd) - plain).abs().max() < 0.1
