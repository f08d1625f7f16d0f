"""Combining adapters exactly or at a lower rank, compared with dense float64 sums, PEFT and bugs of other tools."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, cast_adapter
from lora_diffusion.adapters.blend import Blend, BlendSum, WeightedAdapter
from lora_diffusion.adapters.layers import DoRALayer, FullLayer, Layer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.algebra.combine.exact_sum import combine, joint_sum
from lora_diffusion.algebra.metrics.rounding_error import adapter_rounding_error
from lora_diffusion.algebra.reduce.resize import compress
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.config.combine import CombineConfig, RankRule
from lora_diffusion.config.preset import BlendEntry
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.workflows.adapters.combine import combine_files

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"
FAULTS = json.loads(Path(__file__).with_name("combining_faults.json").read_text())


def lora(seed: int, rank: int, alpha: float, out: int = 12, inner: tuple[int, ...] = (10,)) -> LoRALayer:
    rng = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=rng)
    return LoRALayer(down=torch.randn(rank, *inner, generator=rng), up=up, alpha=alpha)


def other_kinds(seed: int) -> dict[str, Layer]:
    """Layers of all other kinds, for weights of shape (12, 10) or (12, 5, 3, 3)."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "loha": LoHaLayer(w1_a=normal(12, 2), w1_b=normal(2, 10), w2_a=normal(12, 2), w2_b=normal(2, 10), alpha=3.0),
        "lokr": LoKrLayer(w1=normal(3, 2), w2_a=normal(4, 2), w2_b=normal(2, 5), alpha=1.5),
        "full": FullLayer(diff=normal(12, 10)),
        "dora": DoRALayer(inner=lora(seed, 2, 1.0), magnitude=normal(12, 1).abs()),
        "tucker": LoRALayer(down=normal(3, 5, 1, 1), up=normal(12, 3, 1, 1), mid=normal(3, 3, 3, 3), alpha=2.0),
        "flat loha": LoHaLayer(
            w1_a=normal(12, 2), w1_b=normal(2, 45), w2_a=normal(12, 2), w2_b=normal(2, 45), alpha=3.0
        ),
        "full conv": FullLayer(diff=normal(12, 5, 3, 3)),
    }


def dense(layer: Layer) -> Tensor:
    """Return the delta by the papers' formulas in float64, (out, in * kh * kw)."""
    x: Any = layer
    f = {name: factor.double() for name, factor in layer.factors.items()}
    if layer.kind == "full":
        return f["diff"].flatten(1)
    scale = x.alpha / x.rank
    if layer.kind == "LoHa":
        return scale * (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
    if layer.kind == "LoKr":
        return scale * torch.kron(f["w1"], f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"])
    if "mid" in f:
        up, down = f["up"].flatten(1), f["down"].flatten(1)
        return scale * torch.einsum("or,rskl,si->oikl", up, f["mid"], down).flatten(1)
    return scale * f["up"].flatten(1) @ f["down"].flatten(1)


def summed(pairs: list[tuple[float, Layer]]) -> Tensor:
    return torch.stack([weight * dense(layer) for weight, layer in pairs]).sum(0)


def tail(matrix: Tensor, rank: int) -> float:
    """Return the Eckart-Young bound of the error at a rank, from a float64 SVD."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


def blend_of(*pairs: tuple[float, Adapter]) -> Blend:
    return Blend(entries=tuple(WeightedAdapter(adapter=adapter, weight=weight) for weight, adapter in pairs))


def adapter_of(layer: Layer, path: str = LINEAR, **more: Any) -> Adapter:
    return Adapter(layers={path: layer}, **more)


def sum_of(pairs: list[tuple[float, Layer]]) -> BlendSum:
    return joint_sum(blend_of(*((weight, adapter_of(layer)) for weight, layer in pairs)))


@st.composite
def terms(draw: st.DrawFn) -> list[tuple[float, Layer]]:
    """Generate up to four LoRA layers of one linear or convolution module, with positive or negative weights."""
    inner = draw(st.sampled_from([(10,), (5, 3, 3)]))
    weights = st.floats(-2, 2).filter(lambda w: abs(w) > 0.01)
    alphas = st.sampled_from([0.5, 1.0, 3.0, 16.0])
    parts = draw(st.lists(st.tuples(weights, st.integers(1, 6), alphas), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**20))
    return [(weight, lora(seed + i, rank, alpha, inner=inner)) for i, (weight, rank, alpha) in enumerate(parts)]


@settings(max_examples=20)
@given(terms())
def test_combined_delta_equals_the_sum_of_deltas(pairs: list[tuple[float, Layer]]) -> None:
    one = combine(blend_of(*((weight, adapter_of(layer)) for weight, layer in pairs)), AdapterMetadata()).layers[LINEAR]
    scale = sum(float(abs(weight) * dense(layer).norm()) for weight, layer in pairs)
    assert float((dense(one) - summed(pairs)).norm()) < 1e-6 * scale
    assert one.weight_shape == pairs[0][1].weight_shape


@settings(max_examples=20)
@given(terms(), st.integers(1, 30))
def test_compression_reaches_the_optimal_error_and_reports_it(pairs: list[tuple[float, Layer]], rank: int) -> None:
    whole = summed(pairs)
    adapter, report = compress(sum_of(pairs), RankRule(rank=rank), AdapterMetadata())
    layer, loss = adapter.layers[LINEAR], report.modules[LINEAR]
    scale = sum(float(abs(weight) * dense(layer).norm()) for weight, layer in pairs)
    true = float((dense(layer) - whole).norm())
    assert true == pytest.approx(tail(whole, rank), rel=1e-5, abs=1e-6 * scale)
    assert loss.lost == pytest.approx(true, rel=1e-5, abs=1e-6 * scale)
    assert loss.norm == pytest.approx(float(whole.norm()), rel=1e-5, abs=1e-6 * scale)
    assert layer.rank == loss.rank_after <= rank
    assert layer.weight_shape == pairs[0][1].weight_shape


@pytest.mark.parametrize("kind", ["loha", "lokr", "full", "tucker", "flat loha", "full conv"])
@pytest.mark.parametrize("rank", [3, 12])
def test_compression_works_for_every_layer_kind(kind: str, rank: int) -> None:
    shape = (10,) if kind in ("loha", "lokr", "full") else (5, 3, 3)
    pairs = [(0.5, lora(1, 2, 2.0, inner=shape)), (-1.5, other_kinds(7)[kind])]
    whole = summed(pairs)
    adapter, report = compress(sum_of(pairs), RankRule(rank=rank), AdapterMetadata())
    layer = adapter.layers[LINEAR]
    true = float((dense(layer) - whole).norm())
    noise = 2e-6 * float(whole.norm())
    assert true == pytest.approx(tail(whole, rank), rel=1e-5, abs=noise)
    assert report.total.lost == pytest.approx(true, rel=1e-5, abs=noise)
    assert layer.weight_shape == (12, *shape)


def test_compressed_single_layer_keeps_its_weight_shape() -> None:
    flat = other_kinds(1)["flat loha"]
    adapter, _ = compress(sum_of([(1.0, flat)]), RankRule(keep=0.9), AdapterMetadata())
    assert adapter.layers[LINEAR].weight_shape == flat.weight_shape == (12, 45)
    mixed = [(1.0, flat), (1.0, other_kinds(1)["full conv"])]
    adapter, _ = compress(sum_of(mixed), RankRule(keep=0.9), AdapterMetadata())
    assert adapter.layers[LINEAR].weight_shape == (12, 5, 3, 3)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(0, 20), st.sampled_from([(10,), (5, 3, 3)]))
def test_resizing_to_the_same_or_a_higher_rank_is_lossless(rank: int, more: int, inner: tuple[int, ...]) -> None:
    layer = lora(rank, rank, 3.0, inner=inner)
    adapter, report = compress(sum_of([(1.0, layer)]), RankRule(rank=rank + more), AdapterMetadata())
    whole = dense(layer)
    assert float((dense(adapter.layers[LINEAR]) - whole).norm()) < 2e-6 * float(whole.norm())
    assert adapter.layers[LINEAR].rank == rank
    assert report.total.lost == 0


def test_losses_are_aggregated_by_block() -> None:
    paths = [f"unet.{block}.attentions.0.proj_in" for block in ("down_blocks.1", "down_blocks.2", "mid_block")]
    paths += ["unet.down_blocks.1.attentions.1.proj_in"]
    layers = {path: lora(i, 4, 1.0) for i, path in enumerate(paths)}
    _, report = compress(
        joint_sum(blend_of((1.0, Adapter(layers=layers)))), RankRule(rank=1, at_most=3), AdapterMetadata()
    )
    deltas = {path: dense(layer) for path, layer in layers.items()}
    blocks = report.by_group(block_prefix)
    assert set(blocks) == {"unet.down_blocks.1", "unet.down_blocks.2", "unet.mid_block"}
    both = [deltas[path] for path in paths if "down_blocks.1" in path]
    expected = math.sqrt(sum(tail(x, 1) ** 2 for x in both)) / float(torch.cat(both).norm())
    assert blocks["unet.down_blocks.1"].relative == pytest.approx(expected, rel=1e-5)
    all_lost = math.sqrt(sum(tail(x, 1) ** 2 for x in deltas.values()))
    assert report.total.lost == pytest.approx(all_lost, rel=1e-5)
    assert (report.total.modules, report.total.ranks_before, report.total.ranks_after) == (4, (4, 4), (1, 1))


@pytest.mark.parametrize("way", ["rank", "keep", "ratio", "frobenius", "cumulative"])
def test_no_rule_keeps_numerically_zero_singular_values(way: str) -> None:
    """An adapter combined with itself has twice as many factors but the same rank."""
    goal: Any = {"rank": 40, "ratio": 1e6}.get(way, 1)
    layer = lora(1, 16, 16.0, out=64, inner=(48,))
    adapter, _ = compress(sum_of([(1.0, layer), (0.5, layer)]), RankRule(**{way: goal}), AdapterMetadata())
    assert adapter.layers[LINEAR].rank == 16


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"row {fault['row']}: {fault['fault']}")
def test_known_bugs_of_other_tools_do_not_occur(fault: dict[str, Any], tmp_path: Path) -> None:
    """Compare the adapter in the written file with dense float64 sums, for a linear module and a convolution."""
    shapes = {LINEAR: (48,), CONV: (48, 3, 3)}
    seeds = [1 if "alike" in fault else i for i in range(len(fault["adapters"]))]
    adapters = [
        Adapter(layers={path: lora(seed, rank, alpha, 48, inner) for path, inner in shapes.items()})
        for seed, (rank, alpha, _) in zip(seeds, fault["adapters"], strict=True)
    ]
    files = [tmp_path / f"{i}.safetensors" for i in range(len(adapters))]
    for adapter, file in zip(adapters, files, strict=True):
        save_adapter(adapter, file)
    weights = [weight for _, _, weight in fault["adapters"]]
    entries = [BlendEntry(path=str(file), weight=w) for file, w in zip(files, weights, strict=True)]
    rule = RankRule(**fault["rule"]) if fault["rule"] else None
    combine_files(entries, tmp_path / "one.safetensors", CombineConfig(rule=rule))
    loaded = load_adapter(tmp_path / "one.safetensors")
    for path in shapes:
        layer: Any = loaded.layers[path]
        whole = summed([(w, adapter.layers[path]) for w, adapter in zip(weights, adapters, strict=True)])
        bound = tail(whole, fault["rank"]) / float(whole.norm())
        assert layer.rank == fault["rank"]
        assert float((dense(layer) - whole).norm() / whole.norm()) == pytest.approx(bound, rel=1e-5, abs=2e-6)
        assert float(dense(layer).norm() / whole.norm()) == pytest.approx(math.sqrt(1 - bound**2), rel=1e-6)


class Two(nn.Module):
    """A linear module and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(10, 12), nn.Conv2d(5, 12, 3)


@pytest.mark.parametrize("way", ["cat", "svd"])
@pytest.mark.parametrize("weights", [(0.7, -0.3), (1.0, 1.0)])
def test_deltas_match_peft_add_weighted_adapter(way: str, weights: tuple[float, float]) -> None:
    torch.manual_seed(2)
    targets = ["linear", "conv"]
    model: Any = get_peft_model(Two(), LoraConfig(r=3, lora_alpha=6, target_modules=targets), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=1, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    options = {"svd_rank": 3} if way == "svd" else {}
    model.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type=way, **options)
    modules = {name: getattr(model.base_model.model, name) for name in targets}
    adapters = [
        Adapter(
            layers={
                name: LoRALayer(
                    down=module.lora_A[own].weight.detach(), up=module.lora_B[own].weight.detach(), alpha=alpha
                )
                for name, module in modules.items()
            }
        )
        for own, alpha in (("one", 6.0), ("two", 1.0))
    ]
    blend = blend_of(*zip(weights, adapters, strict=True))
    exact = combine(blend, AdapterMetadata())
    small, _ = compress(joint_sum(blend), RankRule(rank=3), AdapterMetadata())
    for name, module in modules.items():
        theirs = module.get_delta_weight("sum").detach()
        ours = (exact if way == "cat" else small).layers[name].delta()
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=2e-5, rtol=1e-4)


def test_modules_of_one_adapter_are_kept_and_norms_and_biases_are_summed() -> None:
    first = Adapter(
        layers={LINEAR: lora(1, 2, 2.0), NORM: FullLayer(diff=torch.arange(4.0))}, biases={NORM: torch.ones(4)}
    )
    second = Adapter(layers={CONV: lora(2, 3, 2.0, inner=(5, 3, 3)), NORM: FullLayer(diff=torch.ones(4))})
    blend = blend_of((0.5, first), (-1.0, second))
    small, report = compress(joint_sum(blend), RankRule(keep=1.0), AdapterMetadata())
    for one in (combine(blend, AdapterMetadata()), small):
        assert set(one.layers) == {LINEAR, CONV, NORM}
        assert torch.equal(one.layers[NORM].delta(), 0.5 * torch.arange(4.0) - 1)
        assert torch.equal(one.biases[NORM], torch.full((4,), 0.5))
    assert set(report.modules) == {LINEAR, CONV}


@pytest.mark.parametrize("kind", ["loha", "lokr", "full", "tucker", "flat loha", "full conv"])
def test_other_kinds_combine_exactly_only_if_their_sum_can_be_stored(kind: str) -> None:
    layer, second = other_kinds(1)[kind], other_kinds(2)[kind]
    alone = combine(blend_of((-0.5, adapter_of(layer))), AdapterMetadata()).layers[LINEAR]
    assert alone.kind == layer.kind
    assert torch.allclose(dense(alone), -0.5 * dense(layer), atol=1e-6)
    pair = blend_of((-0.5, adapter_of(layer)), (2.0, adapter_of(second)))
    if kind.startswith("full"):
        both = combine(pair, AdapterMetadata()).layers[LINEAR]
        assert torch.allclose(dense(both), summed([(-0.5, layer), (2.0, second)]), atol=1e-6)
    else:
        with pytest.raises(
            ConfigError, match=r"attn1.to_q: the sum of several Lo\w+ layers cannot be stored exactly; set a rank"
        ):
            combine(pair, AdapterMetadata())


def test_dora_is_rejected_unless_its_weight_is_one() -> None:
    dora = other_kinds(1)["dora"]
    assert combine(blend_of((1.0, adapter_of(dora))), AdapterMetadata()).layers[LINEAR] is dora
    with pytest.raises(ConfigError, match=r"attn1.to_q: a DoRA layer cannot be scaled by 0.5 without its base model"):
        combine(blend_of((0.5, adapter_of(dora))), AdapterMetadata())
    with pytest.raises(ConfigError, match=r"attn1.to_q: the delta of a DoRA layer depends on the base"):
        compress(sum_of([(1.0, dora)]), RankRule(rank=2), AdapterMetadata())


def with_tokens(name: str, **embeddings: Tensor) -> Adapter:
    tokens = {token: {"text_encoder": vectors} for token, vectors in embeddings.items()}
    return adapter_of(lora(1, 2, 2.0), tokens=tokens, metadata=AdapterMetadata(name=name))


def test_tokens_are_merged_unscaled_and_conflicts_are_rejected() -> None:
    cat, dog = torch.ones(1, 4), torch.zeros(2, 4)
    merged = combine(
        blend_of((0.5, with_tokens("a", cat=cat)), (2.0, with_tokens("b", cat=cat, dog=dog))), AdapterMetadata()
    )
    assert {word: token["text_encoder"].tolist() for word, token in merged.tokens.items()} == {
        "cat": cat.tolist(),
        "dog": dog.tolist(),
    }
    with_first_off = combine(
        blend_of((0.0, with_tokens("a", cat=cat)), (2.0, with_tokens("b", cat=cat + 1))), AdapterMetadata()
    )
    assert torch.equal(with_first_off.tokens["cat"]["text_encoder"], cat + 1)
    with pytest.raises(
        ConfigError, match=r"(a and b|b and a) both define the textual inversion token 'cat', with different embeddings"
    ):
        combine(blend_of((0.5, with_tokens("a", cat=cat)), (2.0, with_tokens("b", cat=cat + 1))), AdapterMetadata())


def test_adapters_of_different_shapes_are_rejected() -> None:
    narrow, wide = (adapter_of(lora(1, 2, 2.0, inner=(n,)), metadata=AdapterMetadata(name=str(n))) for n in (10, 11))
    with pytest.raises(FamilyMismatchError, match=r"attn1.to_q.weight: has shape .* in 1[01] but .* in 1[01]"):
        combine(blend_of((1.0, narrow), (1.0, wide)), AdapterMetadata())


def test_rounding_error_is_measured_on_the_delta() -> None:
    layer = LoRALayer(down=100 * torch.randn(2, 10), up=1e-6 * torch.randn(12, 2), alpha=2.0)
    half = cast_adapter(adapter_of(layer), torch.float16)
    expected = float((dense(half.layers[LINEAR]) - dense(layer)).norm() / dense(layer).norm())
    assert expected > 0.005
    assert adapter_rounding_error(adapter_of(layer), half) == pytest.approx(expected, rel=1e-5)


def test_rounding_error_of_an_adapter_with_only_tokens_is_measured_on_its_embeddings() -> None:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    adapter = Adapter(layers={}, tokens={"<w>": {"text_encoder": vectors}})
    expected = float((vectors - vectors.bfloat16().float()).norm() / vectors.norm())
    assert adapter_rounding_error(adapter, cast_adapter(adapter, torch.bfloat16)) == pytest.approx(expected, rel=1e-5)
    assert adapter_rounding_error(adapter, adapter) == 0
