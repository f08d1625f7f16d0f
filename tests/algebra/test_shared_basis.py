"""Shared bases of several adapters: reported errors are the actual ones."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.layers import DoRALayer, LoHaLayer, LoRALayer
from lora_diffusion.algebra.reduce.shared_basis import AdapterPack, share_bases, unpack_adapter
from lora_diffusion.algebra.svd.svd import spectrum_of, truncate_spectrum
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from tests.helpers.packs import MIDDLE, QUERY, SHAPES, dense, families, new_family, new_layer, true_error


@settings(max_examples=20)
@given(families, st.integers(1, 16), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_reported_error_includes_rounding(adapters: dict[str, Adapter], rank: int, dtype: torch.dtype) -> None:
    family = share_bases(adapters, rank, dtype)
    for name, adapter in adapters.items():
        back = unpack_adapter(family, name)
        assert family.adapters[name].error == pytest.approx(true_error(adapter, back), abs=2e-6)
        for path, layer in adapter.layers.items():
            new = back.layers[path]
            assert isinstance(new, LoRALayer) and isinstance(layer, LoRALayer)
            assert new.weight_shape == layer.weight_shape
            assert new.rank <= min(layer.rank, rank)
            assert new.up.dtype == new.down.dtype == dtype


@settings(max_examples=10)
@given(families)
def test_rank_equal_to_the_sum_of_ranks_is_exact(adapters: dict[str, Adapter]) -> None:
    family = share_bases(adapters, sum(max(x.rank for x in a.layers.values()) for a in adapters.values()))  # type: ignore[attr-defined]
    for name, adapter in adapters.items():
        assert true_error(adapter, unpack_adapter(family, name)) < 1e-5
        assert family.adapters[name].error < 1e-5


@settings(max_examples=10)
@given(families)
def test_bases_are_orthonormal_and_cores_are_the_projections(adapters: dict[str, Adapter]) -> None:
    family = share_bases(adapters, 3)
    for path, module in family.modules.items():
        left, right = module.left.double(), module.right.double()
        assert torch.allclose(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64), atol=1e-5)
        assert torch.allclose(right @ right.T, torch.eye(right.shape[0], dtype=torch.float64), atol=1e-5)
        for name, adapter in adapters.items():
            if path in adapter.layers:
                best = left.T @ dense(adapter.layers[path]) @ right.T
                assert torch.allclose(family.adapters[name].cores[path].delta().double(), best, atol=1e-4)
            else:
                assert path not in family.adapters[name].cores


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_pack_of_one_adapter_is_its_truncated_svd(seed: int, rank: int) -> None:
    adapters = new_family(seed, (4,))
    back = unpack_adapter(share_bases(adapters, rank), "file-0")
    for path, layer in adapters["file-0"].layers.items():
        best = truncate_spectrum(spectrum_of([(1.0, layer)]), rank)
        left, values, right = torch.linalg.svd(dense(layer), full_matrices=False)
        bound = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(dense(back.layers[path]), bound, atol=1e-4)
        assert torch.allclose(dense(back.layers[path]), dense(best), atol=1e-4)


def squared_errors(family: AdapterPack) -> float:
    return sum(member.error**2 for member in family.adapters.values())


@settings(max_examples=10)
@given(families)
def test_error_decreases_with_the_rank(adapters: dict[str, Adapter]) -> None:
    errors = [squared_errors(share_bases(adapters, rank)) for rank in (1, 2, 4, 8, 16)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-9


def converged_error(deltas: list[Tensor], rank: int) -> float:
    """Return the error of Ye's alternating algorithm on dense float64 deltas after 100 iterations."""
    left = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)[0][:, :rank]
    right = left
    for _ in range(100):
        right = torch.linalg.svd(torch.cat([d.T @ left for d in deltas], dim=1), full_matrices=False)[0][:, :rank]
        left = torch.linalg.svd(torch.cat([d @ right for d in deltas], dim=1), full_matrices=False)[0][:, :rank]
    return sum(float(d.square().sum() - (left.T @ d @ right).square().sum()) for d in deltas)


def test_bases_are_converged() -> None:
    """Without any iteration, the error on these inputs is 5 % higher."""
    ours = best = 0.0
    for seed in range(8):
        adapters, rank = new_family(seed, (1 + seed % 3, 2, 4)), 1 + seed % 5
        strengths = {n: sum(float(dense(x).square().sum()) for x in a.layers.values()) for n, a in adapters.items()}
        for path in SHAPES:
            deltas = [dense(a.layers[path]) / strengths[n] ** 0.5 for n, a in adapters.items() if path in a.layers]
            best += converged_error(deltas, rank)
        ours += squared_errors(share_bases(adapters, rank))
    assert ours <= 1.005 * best


def test_common_subspace_is_found() -> None:
    """Twelve adapters within a common subspace of 4 dimensions are represented exactly at rank 4."""
    rng = torch.Generator().manual_seed(0)
    left, right = torch.randn(14, 4, generator=rng), torch.randn(4, 11, generator=rng)
    mixings = [(torch.randn(4, 2, generator=rng), torch.randn(2, 4, generator=rng)) for _ in range(12)]
    adapters = {
        str(n): Adapter(layers={QUERY: LoRALayer(up=left @ first, down=second @ right, alpha=2.0)})
        for n, (first, second) in enumerate(mixings)
    }
    assert max(member.error for member in share_bases(adapters, 4).adapters.values()) < 1e-5
    assert min(member.error for member in share_bases(adapters, 2).adapters.values()) > 0.05


def test_adapters_count_equally_regardless_of_their_strength() -> None:
    even = share_bases(new_family(1, (3, 3, 3)), 3)
    uneven = share_bases(new_family(1, (3, 3, 3), strengths=(1.5, 150.0, 0.015)), 3)
    errors = {name: member.error for name, member in even.adapters.items()}
    assert {name: member.error for name, member in uneven.adapters.items()} == pytest.approx(errors, abs=1e-4)


def test_layers_of_zeros_are_supported() -> None:
    adapters = new_family(2, (2, 2))
    zeros = {path: replace(x, up=torch.zeros_like(x.up)) for path, x in adapters["file-0"].layers.items()}  # type: ignore[attr-defined]
    family = share_bases({**adapters, "file-0": Adapter(layers=zeros)}, 2)
    assert family.adapters["file-0"].error == 0
    assert family.adapters["file-1"].error < 1e-5
    assert all(float(dense(layer).norm()) == 0 for layer in unpack_adapter(family, "file-0").layers.values())


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_rejected(rank: int) -> None:
    with pytest.raises(ConfigError, match="expected an integer of at least 1"):
        share_bases(new_family(0, (2,)), rank)


def test_incompatible_families_shapes_and_kinds_are_rejected() -> None:
    one = new_family(0, (2, 2))
    other = replace(one["file-1"], metadata=AdapterMetadata(family="sdxl"))
    with pytest.raises(FamilyMismatchError, match=r"file-0 is for SD 1.x and file-1 is for SDXL"):
        share_bases({**one, "file-1": other}, 2)
    wide = Adapter(layers={QUERY: new_layer(torch.Generator(), (14, 12), 2, 1.0)})
    with pytest.raises(ConfigError, match=rf"{QUERY}: has shape \(14, 11\) in file-0 and \(14, 12\) in wide"):
        share_bases({**one, "wide": wide}, 2)
    with pytest.raises(ConfigError, match="no adapters"):
        share_bases({}, 2)
    a, b = torch.ones(4, 2), torch.ones(2, 4)
    loha = LoHaLayer(w1_a=a, w1_b=b, w2_a=a, w2_b=b, alpha=2.0)
    dora = DoRALayer(inner=LoRALayer(up=a, down=b, alpha=1.0), magnitude=torch.ones(4, 1))
    tucker = LoRALayer(up=a[..., None, None], down=b[..., None, None], mid=torch.ones(2, 2, 3, 3), alpha=1.0)
    for layer, words in ((loha, "a LoHa layer"), (dora, "a DoRA layer"), (tucker, "LoRA with a Tucker core")):
        with pytest.raises(ConfigError, match=f"odd: {MIDDLE} is {words}; only plain LoRA can share bases"):
            share_bases({"odd": Adapter(layers={MIDDLE: layer})}, 2)
