"""Delta norms from Gram matrices, compared with the norm of the dense product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.algebra.metrics.norms import low_rank_norm
from lora_diffusion.training.optim.max_norm import limit_norms

EPSILON = 2**-24
Pair = tuple[nn.Parameter, nn.Parameter, float]


def factors(seed: int, rank: int, *, kernel: int, alpha: float = 2.0) -> Pair:
    """Draw the factors of a linear layer, or of a convolution if `kernel` is not 0."""
    rng = torch.Generator().manual_seed(seed)
    inner, outer = ((5, kernel, kernel), (7, rank, 1, 1)) if kernel else ((5,), (7, rank))
    down, up = torch.randn(rank, *inner, generator=rng), torch.randn(*outer, generator=rng)
    return nn.Parameter(down), nn.Parameter(up), alpha / rank


def dense(pair: Pair) -> Tensor:
    down, up, scale = pair
    layer = LoRALayer(down=down.detach().double(), up=up.detach().double(), alpha=scale * len(down))
    return layer.delta().double()


modules = st.tuples(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([0, 1, 3]))


@given(module=modules, alpha=st.floats(0.1, 20))
def test_norm_equals_that_of_the_dense_product(module: tuple[int, int, int], alpha: float) -> None:
    seed, rank, kernel = module
    pair = factors(seed, rank, kernel=kernel, alpha=alpha)
    expected = dense(pair).norm()
    # ours is in float64; the dense product is rounded to float32 once, which changes its norm by no more
    torch.testing.assert_close(low_rank_norm(*pair), expected, rtol=2 * EPSILON, atol=0)


@given(drawn=st.lists(modules, min_size=1, max_size=5), largest=st.floats(0.1, 30))
def test_large_deltas_are_scaled_and_others_are_untouched(drawn: list[tuple[int, int, int]], largest: float) -> None:
    pairs = [factors(seed, rank, kernel=kernel) for seed, rank, kernel in drawn]
    before = [dense(pair) for pair in pairs]
    bits = [(down.detach().clone(), up.detach().clone()) for down, up, _ in pairs]
    count = limit_norms(iter(pairs), largest)
    slack = 8 * EPSILON  # both factors are rounded once, the product is summed from them
    assert count == sum(float(delta.norm()) > largest for delta in before)
    for pair, delta, (down, up) in zip(pairs, before, bits, strict=True):
        norm = float(delta.norm())
        if norm <= largest:
            assert torch.equal(pair[0], down) and torch.equal(pair[1], up)
            continue
        after = dense(pair)
        assert float(after.norm()) <= largest * (1 + slack)
        largest_entry = float(down.abs().max() * up.abs().max()) * len(down)
        torch.testing.assert_close(after, delta * (largest / norm), rtol=0, atol=slack * largest_entry * pair[2] * 4)
    assert limit_norms(pairs, largest * (1 + slack)) == 0


def test_norm_is_accurate_if_factors_nearly_cancel() -> None:
    # up's columns lie where down's rows are dependent: the product is a millionth of the factors
    down = torch.tensor([[1.0, 0.0], [1.0, 2.0**-20]])
    up = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    expected = (up.double() @ down.double()).norm()
    torch.testing.assert_close(low_rank_norm(down, up, 1.0), expected, rtol=1e-3, atol=0)


def test_zero_deltas_are_not_scaled() -> None:
    down = nn.Parameter(torch.randn(4, 5))
    assert limit_norms([(down, nn.Parameter(torch.zeros(6, 4)), 1.0)], 1e-6) == 0
    assert limit_norms([], 1.0) == 0


def test_up_with_a_kernel_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"expected \(out, r\)"):
        low_rank_norm(torch.zeros(2, 3), torch.zeros(4, 2, 3, 3), 1.0)
