"""Products of low-rank factors and Tucker cores, from which LoHa and LoKr layers are built, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tucker_product(core: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Contract a Tucker core (r, q, kh, kw) with `first` (r, out) and `second` (q, in) to (out, in, kh, kw)."""
    import torch

    return torch.einsum("ijkl,ip,jr->prkl", core.float(), first.float(), second.float())


def low_rank_product(first: Tensor, second: Tensor, core: Tensor | None) -> Tensor:
    """Multiply two factors, with a Tucker core between them if there is one, in float32."""
    return first.float() @ second.float() if core is None else tucker_product(core, first, second)


def kronecker_factor(full: Tensor | None, first: Tensor | None, second: Tensor | None, core: Tensor | None) -> Tensor:
    """Compute one factor of a LoKr layer in float32.

    Args:
        full: The factor itself (`w1` or `w2`), or None if it is low-rank.
        first: Left low-rank factor (`w1_a` or `w2_a`).
        second: Right low-rank factor (`w1_b` or `w2_b`).
        core: Tucker core (`t2`) between them, or None.
    """
    if full is not None:
        return full.float()
    assert first is not None and second is not None
    return low_rank_product(first, second, core)


def kronecker_factor_shape(
    full: Tensor | None, first: Tensor | None, second: Tensor | None, core: Tensor | None
) -> tuple[int, ...]:
    """Return the shape of `kronecker_factor` without computing it."""
    if full is not None:
        return tuple(full.shape)
    assert first is not None and second is not None
    if core is not None:
        return (first.shape[1], second.shape[1], *core.shape[2:])
    return (first.shape[0], second.shape[1])


def is_one_or_pair(full: Tensor | None, first: Tensor | None, second: Tensor | None, core: Tensor | None) -> bool:
    """Return whether a Kronecker factor is given in exactly one form, full or low-rank, with matching ranks."""
    if full is not None:
        return first is None and second is None and core is None and full.ndim in (2, 4)
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    if core is None:
        return first.shape[1] == second.shape[0]
    return core.ndim == 4 and tuple(core.shape[:2]) == (first.shape[0], second.shape[0])
