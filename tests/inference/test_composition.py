"""Composition modes: LoRA Switch, Composite, K-LoRA, NP-LoRA and regions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.adapters.masks import infer_token_grid, region_mask, resize_mask
from lora_diffusion.algebra.combine.np_lora import find_main_directions, project_out
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendWeight, Composition, Region
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.composition import composition_context
from lora_diffusion.inference.in_place import blended_weights, weight_at
from lora_diffusion.inference.regional import NON_SPATIAL
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import encode_prompts
from tests.conftest import random_adapter
from tests.helpers.blends import blend_of, parameters, same
from tests.inference.test_parallel import PROMPTS, everywhere, predict

SIZE = (16, 16)
WHOLE_PICTURE = Region(box=(0, 0, 1, 1), feather=0)
LEFT = Region(box=(0, 0, 0.5, 1), feather=0)
SMALL = GenerateConfig(prompt="a cat", num_inference_steps=2, seed=5, width=32, height=32)


def no_prompt() -> Tensor:
    raise AssertionError("no adapter here changes a text encoder in a region")


def unet_only(base: Base, seed: int) -> Adapter:
    return random_adapter(base, seed=seed, text_encoders=())


def normal_layer(rng: torch.Generator, rank: int, inner: int, out: int) -> LoRALayer:
    down, up = torch.randn(rank, inner, generator=rng), torch.randn(out, rank, generator=rng)
    return LoRALayer(down=down, up=up, alpha=3.0)


def at_step(base: Base, blend: Blend, composition: Composition, step: int, steps: int = 10) -> dict[str, Tensor]:
    with composition_context(base, blend, composition, SIZE) as before_step:
        before_step(DenoisingStep(index=step, total=steps), no_prompt)
        return parameters(base)


def fresh(base: Base, blend: Blend) -> dict[str, Tensor]:
    with blended_weights(base, blend):
        return parameters(base)


def placed(adapter: Adapter, region: Region, weight: float = 1.0) -> Blend:
    return Blend(entries=(WeightedAdapter(adapter=adapter, weight=weight, region=region),))


def test_switch_has_one_adapter_in_the_unet_at_a_time(sd: Base) -> None:
    first, second = random_adapter(sd, seed=1), random_adapter(sd, seed=2, rank=2)
    blend = blend_of((first, 0.8), (second, -0.5))
    for step, turn in ((0, 0), (2, 0), (3, 1), (5, 1), (6, 0)):
        live = at_step(sd, blend, Composition(mode="switch", switch_every=3), step)
        one = fresh(sd, blend_of(((first, second)[turn], (0.8, -0.5)[turn])))
        both = fresh(sd, blend)
        assert all(torch.equal(live[name], (one if name.startswith("unet.") else both)[name]) for name in live)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_composite_is_the_mean_of_what_each_adapter_predicts(family: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(family)
    adapters = [unet_only(base, seed) for seed in range(3)]
    weights = (1.0, 0.5, -0.7)
    expected = []
    for adapter, weight in zip(adapters, weights, strict=True):
        with blended_weights(base, blend_of((adapter, weight))):
            expected.append(predict(base))
    blend = blend_of(*zip(adapters, weights, strict=True))
    with composition_context(base, blend, Composition(mode="composite"), SIZE) as before_step:
        before_step(DenoisingStep(index=0, total=2), no_prompt)
        found = predict(base)
    assert torch.allclose(found, torch.stack(expected).mean(0), atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_region_that_covers_the_image_equals_no_region(family: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(family)
    adapter = everywhere(base, 1)
    layers = {path: layer for path, layer in adapter.layers.items() if not NON_SPATIAL.search(path)}
    whole = Adapter(layers=layers, biases=adapter.biases, metadata=adapter.metadata)
    with blended_weights(base, blend_of((whole, 0.5))):
        expected = predict(base)
    with composition_context(base, placed(whole, WHOLE_PICTURE, 0.5), Composition(), SIZE) as before_step:
        before_step(DenoisingStep(index=0, total=2), lambda: encode_prompts(base, PROMPTS, size_px=32).hidden)
        assert torch.allclose(predict(base), expected, atol=2e-4)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_image_with_a_region_that_covers_it_equals_one_without(family: str, request: pytest.FixtureRequest) -> None:
    base: Base = request.getfixturevalue(family)
    adapter = random_adapter(base, seed=1)
    assert set(adapter.components) == set(base.family.components)
    settings = [SMALL.model_copy(update={"negative_prompt": "a dog"}), SMALL.model_copy(update={"guidance_scale": 1.0})]
    plain = generate(base, settings, blend_of((adapter, 0.7)))
    found = generate(base, settings, placed(adapter, WHOLE_PICTURE, 0.7))
    for one, other in zip(plain, found, strict=True):
        assert np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).max() <= 1


def test_the_prompt_of_a_region_is_encoded_with_its_own_text_encoder(sd: Base) -> None:
    """The left half uses the prompt encoded with the adapter, the right half without; the UNet is not changed."""
    adapter = random_adapter(sd, seed=1, unet=())
    assert adapter.components == ("text_encoder",)
    module = sd.pipe.unet.get_submodule("up_blocks.1.attentions.2.transformer_blocks.0.attn2")
    width = module.to_q.weight.shape[1]
    x = torch.randn(1, 256, width, generator=torch.Generator().manual_seed(0))

    def read() -> Tensor:
        return encode_prompts(sd, ["a cat"], size_px=32).hidden

    own = read()
    with blended_weights(sd, blend_of((adapter, 1.0))):
        changed = read()
    with torch.no_grad():
        halves = [module(x, encoder_hidden_states=states).reshape(16, 16, width) for states in (changed, own)]
        with composition_context(sd, placed(adapter, LEFT), Composition(), SIZE) as before_step:
            before_step(DenoisingStep(index=0, total=2), read)
            found = module(x, encoder_hidden_states=changed).reshape(16, 16, width)
    assert torch.allclose(found[:, :8], halves[0][:, :8], atol=1e-5)
    assert torch.allclose(found[:, 8:], halves[1][:, 8:], atol=1e-5)
    assert not torch.allclose(halves[0], halves[1], atol=1e-3)


def test_an_adapter_acts_in_its_region_and_nowhere_else(sd: Base) -> None:
    """The adapter changes the last convolution only, so that no later layer spreads its effect."""
    path = "unet.conv_out"
    rng = torch.Generator().manual_seed(0)
    shape = weight_at(sd, path).shape
    layer = LoRALayer(
        down=torch.randn(2, *shape[1:], generator=rng), up=torch.randn(4, 2, 1, 1, generator=rng), alpha=2.0
    )
    bare = predict(sd)
    blend = placed(Adapter(layers={path: layer}), LEFT)
    with composition_context(sd, blend, Composition(), SIZE) as before_step:
        before_step(DenoisingStep(index=0, total=2), no_prompt)
        change = (predict(sd) - bare).abs().amax(dim=(0, 1))
    assert bool((change[:, :8] > 0).all())
    assert float(change[:, 8:].max()) == 0


def test_two_adjacent_regions_do_not_affect_each_other(sd: Base) -> None:
    """Each half of the image uses the cross-attention values of its own adapter."""
    path = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v"
    out, inner = weight_at(sd, path).shape
    rng = torch.Generator().manual_seed(0)
    one, two = (
        Adapter(
            layers={
                path: LoRALayer(
                    down=torch.randn(2, inner, generator=rng), up=torch.randn(out, 2, generator=rng), alpha=2.0
                )
            }
        )
        for _ in range(2)
    )
    module = sd.pipe.unet.get_submodule(path.removeprefix("unet.").removesuffix(".to_v"))
    x, context = torch.randn(1, 256, out, generator=rng), torch.randn(1, 7, inner, generator=rng)
    right = Region(box=(0.5, 0, 1, 1), feather=0)
    entries = (WeightedAdapter(adapter=one, region=LEFT), WeightedAdapter(adapter=two, region=right))
    with torch.no_grad():
        with composition_context(sd, Blend(entries=entries), Composition(), SIZE) as before_step:
            before_step(DenoisingStep(index=0, total=2), no_prompt)
            found = module(x, encoder_hidden_states=context).reshape(16, 16, out)
        halves = []
        for adapter in (one, two):
            with blended_weights(sd, blend_of((adapter, 1.0))):
                halves.append(module(x, encoder_hidden_states=context).reshape(16, 16, out))
    assert torch.allclose(found[:, :8], halves[0][:, :8], atol=1e-5)
    assert torch.allclose(found[:, 8:], halves[1][:, 8:], atol=1e-5)
    assert not torch.allclose(halves[0], halves[1], atol=1e-2)


def test_modules_without_spatial_output_are_refused_in_a_region(sd: Base) -> None:
    with (
        pytest.raises(ConfigError, match="acts on the whole image"),
        composition_context(
            sd, placed(everywhere(sd, 1), Region(box=(0, 0, 0.5, 1))), Composition(), SIZE
        ) as before_step,
    ):
        before_step(DenoisingStep(index=0, total=2), no_prompt)
    assert not any("forward" in vars(module) for module in sd.pipe.unet.modules())


def test_masks_are_drawn_or_boxes_and_soft_at_the_edge(tmp_path: object) -> None:
    hard = region_mask(Region(box=(0.25, 0, 0.75, 1), feather=0))
    assert hard.shape == (512, 512)
    assert hard.mean() == 0.5
    soft = region_mask(Region(box=(0.25, 0, 0.75, 1), feather=0.2))
    assert soft[256, 256] > 0.95
    assert 0.4 < float(soft[256, 128]) < 0.6
    assert resize_mask(hard, 8, 8)[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    file = f"{tmp_path}/mask.png"
    Image.frombytes("L", (4, 2), bytes([255, 255, 0, 0] * 2)).save(file)
    drawn = resize_mask(region_mask(Region(mask=file, feather=0)), 2, 4)
    assert drawn[:, 0].min() > 0.9
    assert drawn[:, 3].max() < 0.1
    with pytest.raises(ConfigError, match="not the mask that the recipe was made with"):
        region_mask(Region(mask=file, mask_hash="0" * 64))


@given(st.integers(1, 130), st.integers(1, 130), st.integers(0, 4))
def test_the_token_grid_is_inferred_at_every_scale(height: int, width: int, halvings: int) -> None:
    rows, columns = height, width
    for _ in range(halvings):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    found = infer_token_grid(rows * columns, height, width)
    assert found[0] * found[1] == rows * columns
    if halvings == 0:
        assert found == (height, width)


def test_k_lora_takes_one_adapter_at_each_layer_and_more_style_later(sd: Base) -> None:
    subject, style = unet_only(sd, 1), unet_only(sd, 2)
    blend = blend_of((subject, 0.7), (style, 1.0))
    only_subject, only_style = (fresh(sd, blend_of(pair)) for pair in ((subject, 0.7), (style, 1.0)))
    taken = []
    for step in (0, 5, 9):
        live = at_step(sd, blend, Composition(mode="k-lora"), step)
        names = [f"{path}.weight" for path in subject.layers]
        styled = [torch.equal(live[name], only_style[name]) for name in names]
        for name, is_style in zip(names, styled, strict=True):
            assert is_style or torch.equal(live[name], only_subject[name])
        taken.append(sum(styled))
    assert taken == sorted(taken)
    assert taken[0] == 0
    assert taken[-1] == len(subject.layers)
    middle = at_step(sd, blend, Composition(mode="k-lora", k_lora_slope=0.0, k_lora_start=1.0), 0)
    chosen = sum(torch.equal(middle[name], only_style[name]) for name in names)
    assert 0 < chosen < len(names)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(0, 50))
def test_a_projection_damps_exactly_the_styles_main_directions(seed: int, strength: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    subject, style = (
        LoRALayer(down=torch.randn(r, 24, generator=rng), up=torch.randn(16, r, generator=rng), alpha=3.0)
        for r in (5, 4)
    )
    path = "unet.conv_in"
    moved = project_out(Adapter(layers={path: subject}), Adapter(layers={path: style}), strength).layers[path]
    directions = find_main_directions(style).double()
    assert torch.allclose(directions.T @ directions, torch.eye(directions.shape[1], dtype=torch.float64), atol=1e-5)
    before, after = subject.delta().double(), moved.delta().double()
    kept = before @ (torch.eye(24, dtype=torch.float64) - directions @ directions.T)
    assert torch.allclose(after @ directions, before @ directions / (1 + strength), atol=1e-4)
    assert torch.allclose(after - after @ directions @ directions.T, kept, atol=1e-4)
    held = (style.delta().double() @ directions).square().sum() / style.delta().double().square().sum()
    assert held > 0.949


def test_np_lora_without_strength_is_the_sum_and_against_itself_leaves_little(sd: Base) -> None:
    subject, style = random_adapter(sd, seed=1), random_adapter(sd, seed=2)
    blend = blend_of((subject, 0.7), (style, 1.0))
    plain = at_step(sd, blend, Composition(mode="np-lora", projection_strength=0.0), 0)
    assert all(torch.allclose(plain[name], value, atol=1e-6) for name, value in fresh(sd, blend).items())
    twice = blend_of((subject, 1.0), (subject, 1.0))
    live = at_step(sd, twice, Composition(mode="np-lora", projection_strength=1e6), 0)
    once, double = fresh(sd, blend_of((subject, 1.0))), fresh(sd, twice)
    name = f"{next(iter(subject.layers))}.weight"
    assert (live[name] - once[name]).norm() < 0.3 * (double[name] - once[name]).norm()


@pytest.mark.parametrize(
    ("composition", "count", "message"),
    [
        (Composition(mode="k-lora"), 3, "k-lora needs exactly two adapters"),
        (Composition(mode="np-lora"), 1, "needs a subject followed by at least one style"),
    ],
)
def test_a_mode_that_the_blend_cannot_have_is_refused(
    sd: Base, composition: Composition, count: int, message: str
) -> None:
    blend = blend_of(*((unet_only(sd, seed), 1.0) for seed in range(count)))
    with pytest.raises(ConfigError, match=message), composition_context(sd, blend, composition, SIZE):
        pass


def test_regions_and_modes_exclude_each_other(sd: Base) -> None:
    blend = placed(unet_only(sd, 1), Region(box=(0, 0, 0.5, 1)))
    with pytest.raises(ConfigError, match="does not support regions; use sum"):
        generate(sd, [SMALL], blend, composition=Composition(mode="switch"))


@pytest.mark.parametrize("mode", ["sum", "switch", "composite", "k-lora", "np-lora"])
@pytest.mark.parametrize("exact", [False, True])
def test_every_mode_makes_its_own_picture_and_leaves_the_base_alone(sd: Base, mode: str, exact: bool) -> None:
    before = parameters(sd)
    blend = blend_of((random_adapter(sd, seed=1), 0.8), (random_adapter(sd, seed=2), 0.6))
    options = {"switch_every": 1} if mode == "switch" else {}
    composition = Composition(mode=mode, parallel=exact, **options)  # type: ignore[arg-type]
    first, again = (generate(sd, [SMALL], blend, composition=composition)[0] for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.recipe.composition == composition
    plain = generate(sd, [SMALL], blend)[0].image.tobytes()
    if not exact:
        assert (first.image.tobytes() == plain) == (mode == "sum")
    assert same(before, parameters(sd))
    assert not any("forward" in vars(module) for module in sd.pipe.unet.modules())


def test_exact_is_the_same_picture_to_rounding(sd: Base) -> None:
    blend = blend_of((random_adapter(sd, seed=1), BlendWeight(value=0.8, blocks={"M00": 0.5})))
    pictures = [
        generate(sd, [SMALL], blend, composition=Composition(parallel=exact))[0].image for exact in (False, True)
    ]
    difference = [abs(a - b) for a, b in zip(pictures[0].tobytes(), pictures[1].tobytes(), strict=True)]
    assert max(difference) <= 1


def test_the_base_file_serves_as_the_backup_of_every_mode(sd: Base) -> None:
    before = parameters(sd)
    blend = blend_of((random_adapter(sd, seed=1), 0.8), (random_adapter(sd, seed=2), 0.6))
    composition = Composition(mode="switch", switch_every=1)
    kept, mapped = (
        generate(sd, [SMALL], blend, composition=composition, backup=backup)[0].image.tobytes()
        for backup in ("memory", "file")
    )
    assert kept == mapped
    assert same(before, parameters(sd))


def test_transparent_and_dark_parts_of_a_mask_are_outside_the_region(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 2, 4))
    clear.save(tmp_path / "clear.png")
    assert resize_mask(region_mask(Region(mask=str(tmp_path / "clear.png"), feather=0)), 1, 4)[0, 3] < 0.1
    deep = Image.fromarray(np.array([[0, 65535], [0, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    found = resize_mask(region_mask(Region(mask=str(tmp_path / "deep.png"), feather=0)), 1, 4)[0]
    assert found[0] < 0.1 < 0.9 < found[3]
    Image.new("L", (4, 4), 0).save(tmp_path / "black.png")
    with pytest.raises(ConfigError, match="is empty"):
        region_mask(Region(mask=str(tmp_path / "black.png")))


def test_a_setting_of_another_mode_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="projection_strength is a setting of the mode np-lora; the mode switch does not"
    ):
        validate(Composition, {"mode": "switch", "projection_strength": 3.0}, source="generate")
