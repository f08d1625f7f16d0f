"""Pruning: exact fractions, reported errors against actual ones, and rejected inputs."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash, cast_adapter
from lora_diffusion.adapters.layers import DoRALayer, FullLayer, LoHaLayer, LoRALayer
from lora_diffusion.algebra.reduce.prune import measure_sparsity, prune_deltas, prune_factors
from lora_diffusion.cli import main
from lora_diffusion.config.adapter_files import PruneConfig, PruneScope
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.workflows.adapters.prune import prune_file

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.0.resnets.0.conv1"
MIDDLE = "unet.mid_block.attentions.0.proj_in"
scopes = st.sampled_from(["module", "adapter"])


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """A linear, a convolution and a lopsided layer of mixed ranks and alphas; factors without zeros or ties."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.integers(1, 4))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    layers = {
        QUERY: LoRALayer(up=normal(9, rank), down=normal(rank, 7), alpha=draw(st.sampled_from([0.5, 4.0, -2.0]))),
        CONV: LoRALayer(up=normal(6, 2, 1, 1), down=normal(2, 4, 3, 3), alpha=3.0),
        MIDDLE: LoRALayer(up=0.01 * normal(8, 3), down=50 * normal(3, 8), alpha=1.0),
    }
    metadata = AdapterMetadata(name="drawn", family="sd1", trigger_words=("sks",))
    return Adapter(
        layers=layers, biases={CONV: normal(6)}, tokens={"<w>": {"text_encoder": normal(2, 8)}}, metadata=metadata
    )


def dense(layer: object) -> Tensor:
    """The definition, in float64."""
    if isinstance(layer, FullLayer):
        return layer.diff.double()
    assert isinstance(layer, LoRALayer)
    return layer.alpha / layer.rank * torch.einsum("or,r...->o...", layer.up.double().flatten(1), layer.down.double())


def true_errors(before: Adapter, after: Adapter) -> tuple[float, dict[str, float]]:
    lost = {path: float((dense(x) - dense(after.layers[path])).norm()) for path, x in before.layers.items()}
    norms = {path: float(dense(x).norm()) for path, x in before.layers.items()}
    total = sum(x**2 for x in lost.values()) ** 0.5 / sum(x**2 for x in norms.values()) ** 0.5
    return total, {path: lost[path] / norms[path] for path in lost}


@settings(max_examples=20)
@given(adapters(), st.floats(0.01, 1), scopes)
def test_pruning_keeps_the_exact_fraction_and_reports_the_actual_error(
    adapter: Adapter, keep: float, scope: PruneScope
) -> None:
    pruned = prune_factors(adapter, keep, scope)
    found = measure_sparsity(adapter, pruned)
    sizes = [x.up.numel() + x.down.numel() for x in adapter.layers.values() if isinstance(x, LoRALayer)]
    expected = sum(round(keep * size) for size in sizes) if scope == "module" else round(keep * sum(sizes))
    nonzeros = sum(int((f != 0).sum()) for layer in pruned.layers.values() for f in layer.factors.values())
    assert (found.nonzeros, found.entries) == (nonzeros, sum(sizes)) == (expected, sum(sizes))
    total, each = true_errors(adapter, pruned)
    assert found.error == pytest.approx(total, abs=1e-6)
    assert {path: found.error_over([path]) for path in each} == pytest.approx(each, abs=1e-6)


@settings(max_examples=10)
@given(adapters(), st.floats(0.01, 1), scopes)
def test_remaining_values_are_unchanged(adapter: Adapter, keep: float, scope: PruneScope) -> None:
    pruned = prune_factors(adapter, keep, scope)
    for path, layer in adapter.layers.items():
        for name, factor in layer.factors.items():
            left = pruned.layers[path].factors[name]
            assert left.shape == factor.shape
            assert torch.equal(left, torch.where(left != 0, factor, 0))
    assert pruned.metadata == adapter.metadata
    assert torch.equal(pruned.biases[CONV], adapter.biases[CONV])
    assert torch.equal(pruned.tokens["<w>"]["text_encoder"], adapter.tokens["<w>"]["text_encoder"])


@settings(max_examples=10)
@given(adapters(), scopes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_keeping_everything_is_the_identity(adapter: Adapter, scope: PruneScope, dtype: torch.dtype) -> None:
    whole = cast_adapter(adapter, dtype)
    pruned = prune_factors(whole, 1.0, scope)
    assert adapter_hash(pruned) == adapter_hash(whole)
    assert measure_sparsity(whole, pruned).error == 0
    deltas = prune_deltas(whole, 1.0, scope)
    assert all(torch.equal(deltas.layers[path].delta(), layer.delta()) for path, layer in whole.layers.items())


@settings(max_examples=10)
@given(adapters(), st.integers(-6, 6), st.floats(0.1, 0.9), scopes)
def test_pruning_does_not_depend_on_the_scale_of_the_factors(
    adapter: Adapter, power: int, keep: float, scope: PruneScope
) -> None:
    moved = {
        path: LoRALayer(up=x.up * 2.0**power, down=x.down * 2.0**-power, alpha=x.alpha)
        for path, x in adapter.layers.items()
        if isinstance(x, LoRALayer)
    }
    ours = prune_factors(adapter, keep, scope)
    theirs = prune_factors(Adapter(layers=moved), keep, scope)
    assert all(torch.equal(ours.layers[path].delta(), theirs.layers[path].delta()) for path in moved)


@settings(max_examples=10)
@given(adapters(), st.floats(0.05, 0.95))
def test_score_of_an_entry_is_the_error_of_removing_it(adapter: Adapter, keep: float) -> None:
    """Every entry that goes would by itself cost no more than any that stays, in the Frobenius norm of the delta."""
    layer = adapter.layers[QUERY]
    assert isinstance(layer, LoRALayer)
    pruned = prune_factors(adapter, keep).layers[QUERY]
    cost: dict[bool, list[float]] = {True: [], False: []}
    for name, factor in layer.factors.items():
        for place in torch.cartesian_prod(*map(torch.arange, factor.shape)).tolist():
            without = factor.clone()
            without[tuple(place)] = 0
            stays = bool(pruned.factors[name][tuple(place)] != 0)
            cost[stays].append(float((dense(layer) - dense(layer.with_factors({name: without}))).norm()))
    assert max(cost[False], default=0) <= min(cost[True], default=1e9) * (1 + 1e-5)


@settings(max_examples=15)
@given(adapters(), st.floats(0.01, 1), scopes)
def test_largest_entries_of_the_delta_are_kept(adapter: Adapter, keep: float, scope: PruneScope) -> None:
    pruned = prune_deltas(adapter, keep, scope)
    before = {path: layer.delta() for path, layer in adapter.layers.items()}
    groups = [[path] for path in before] if scope == "module" else [list(before)]
    for group in groups:
        old = torch.cat([before[path].flatten() for path in group])
        new = torch.cat([pruned.layers[path].delta().flatten() for path in group])
        count = round(keep * old.numel())
        assert int((new != 0).sum()) == count
        best = old.abs().sort(descending=True).values[:count].double().square().sum()
        assert float(new.double().square().sum()) == pytest.approx(float(best), rel=1e-9)
    total, each = true_errors(adapter, pruned)
    found = measure_sparsity(adapter, pruned)
    assert found.error == pytest.approx(total, abs=1e-6)
    assert {path: found.error_over([path]) for path in each} == pytest.approx(each, abs=1e-6)


def test_pruning_over_the_adapter_loses_less_than_by_module() -> None:
    rng = torch.Generator().manual_seed(3)
    sizes = {QUERY: 0.1, MIDDLE: 1.0}
    layers = {
        path: LoRALayer(up=torch.randn(12, 3, generator=rng), down=torch.randn(3, 12, generator=rng) * size, alpha=3.0)
        for path, size in sizes.items()
    }
    adapter = Adapter(layers=layers)
    errors = [measure_sparsity(adapter, prune_factors(adapter, 0.5, scope)).error for scope in ("adapter", "module")]
    assert errors[0] < 0.8 * errors[1]


def other_kinds() -> dict[str, tuple[Adapter, str]]:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 2, generator=rng), torch.randn(2, 4, generator=rng)
    loha = LoHaLayer(w1_a=a, w1_b=b, w2_a=a, w2_b=b, alpha=2.0)
    lora = LoRALayer(up=a, down=b, alpha=2.0)
    tucker = LoRALayer(up=a[..., None, None], down=b[..., None, None], mid=torch.randn(2, 2, 3, 3), alpha=1.0)
    dora = DoRALayer(inner=lora, magnitude=torch.ones(4, 1))
    kinds = {"LoHa layer": loha, "LoRA with a Tucker core": tucker, "DoRA layer": dora}
    return {words: (Adapter(layers={QUERY: layer}), words) for words, layer in kinds.items()}


@pytest.mark.parametrize(("adapter", "words"), other_kinds().values(), ids=other_kinds())
def test_factors_of_other_kinds_are_rejected(adapter: Adapter, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{QUERY}: is .*{words}.*prune the delta"):
        prune_factors(adapter, 0.5)


def test_deltas_of_other_kinds_are_pruned_but_not_dora() -> None:
    kinds = other_kinds()
    for name in ("LoHa layer", "LoRA with a Tucker core"):
        adapter = kinds[name][0]
        pruned = prune_deltas(adapter, 0.25)
        total = adapter.layers[QUERY].delta().double()
        lost = total - pruned.layers[QUERY].delta().double()
        assert measure_sparsity(adapter, pruned).error == pytest.approx(float(lost.norm() / total.norm()), abs=1e-6)
        assert measure_sparsity(adapter, pruned).share == 0.25
    with pytest.raises(ConfigError, match="is DoRA, whose delta depends on the base"):
        prune_deltas(kinds["DoRA layer"][0], 0.5)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_invalid_fractions_are_rejected(keep: float) -> None:
    layer = LoRALayer(up=torch.ones(3, 1), down=torch.ones(1, 3), alpha=1.0)
    for prune in (prune_factors, prune_deltas):
        with pytest.raises(ConfigError, match=r"expected a fraction of the entries above 0 and at most 1"):
            prune(Adapter(layers={QUERY: layer}), keep)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = torch.Generator().manual_seed(5)
    layers = {
        QUERY: LoRALayer(up=torch.randn(32, 4, generator=rng), down=torch.randn(4, 32, generator=rng), alpha=4.0),
        MIDDLE: LoRALayer(up=torch.randn(16, 2, generator=rng), down=torch.randn(2, 16, generator=rng), alpha=4.0),
    }
    adapter = Adapter(layers=layers, metadata=AdapterMetadata(name="a", family="sd1", trigger_words=("sks",)))
    save_adapter(cast_adapter(adapter, torch.float16), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize("what", ["factors", "delta"])
@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
def test_file_matches_the_report(file: Path, tmp_path: Path, what: str, dtype: str) -> None:
    output = tmp_path / "out.safetensors"
    result = prune_file(file, output, PruneConfig(keep=0.5, what=what, dtype=dtype))  # type: ignore[arg-type]
    before, after = load_adapter(file), load_adapter(output)
    total, each = true_errors(before, after)
    assert result.sparsity.error == pytest.approx(total, abs=1e-6)
    assert result.block_errors == pytest.approx(
        {"unet.down_blocks.0": each[QUERY], "unet.mid_block": each[MIDDLE]}, abs=1e-6
    )
    assert result.sparsity.share == pytest.approx(0.5, abs=0.002)
    types = {factor.dtype for layer in after.layers.values() for factor in layer.factors.values()}
    assert types == {torch.float16 if dtype == "keep" else getattr(torch, dtype)}
    assert after.metadata.trigger_words == ("sks",)
    assert after.metadata.merged_from == (adapter_hash(before),)
    assert (result.bytes_before, result.bytes_after) == (file.stat().st_size, output.stat().st_size)


def test_existing_files_and_inputs_are_not_overwritten(file: Path, tmp_path: Path) -> None:
    output, before = tmp_path / "out.safetensors", file.read_bytes()
    prune_file(file, output, PruneConfig(keep=0.5))
    with pytest.raises(OutputError, match="already exists; choose another output, or replace it with --force"):
        prune_file(file, output, PruneConfig(keep=0.5))
    prune_file(file, output, PruneConfig(keep=0.25, force=True))
    assert measure_sparsity(load_adapter(file), load_adapter(output)).share == 0.25
    with pytest.raises(OutputError, match="is one of the inputs"):
        prune_file(file, file, PruneConfig(keep=0.5, force=True))
    assert file.read_bytes() == before


def test_command_prints_the_result(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(file), str(tmp_path / "a.safetensors"), "--keep", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["nonzeros"], report["entries"], report["share"]) == (160, 320, 0.5)
    assert main(["prune", str(file), str(tmp_path / "b.safetensors"), "--keep", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "160 of 320 values are not zero (50.00%)" in text
    assert f"error of the deltas: {report['error']:.3g} of their norm" in text
