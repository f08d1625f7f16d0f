"""Max-norm regularization: keep the norm of every delta below a limit (kohya's `scale_weight_norms`)."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor


@torch.no_grad()
def limit_norms(pairs: Iterable[tuple[Tensor, Tensor, float]], largest: float) -> int:
    """Scale factors in place so that every ||scale * up @ down||_F is at most `largest`.

    Both factors of a module whose norm is too large are multiplied by sqrt(largest / norm), which keeps the ratio of
    their norms. All other factors are left untouched. The device is synchronized once.

    Args:
        pairs: down (r, in) or (r, in, kh, kw), up (out, r) or (out, r, 1, 1) and the scale alpha / r of each module.
            All tensors must be on one device.
        largest: Largest norm allowed.

    Returns:
        The number of modules that were scaled.
    """
    modules = tuple(pairs)
    if not modules:
        return 0
    # one transfer from the device for all modules; Tensor.tolist has no element type
    norms: list[float] = cast(Any, torch.stack([delta_norm(down, up, scale) for down, up, scale in modules])).tolist()
    too_large = [(pair, norm) for pair, norm in zip(modules, norms, strict=True) if norm > largest]
    for (down, up, _), norm in too_large:
        factor = (largest / norm) ** 0.5
        down.mul_(factor)
        up.mul_(factor)
    return len(too_large)


def delta_norm(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute ||scale * up @ down||_F, a scalar, without forming the product.

    The square of the norm is scale^2 tr(up^T up down down^T), from two r x r Gram matrices. It is computed in float64
    where the device supports it, because the trace loses digits when up and down nearly cancel.

    Args:
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        scale: Multiplier of the product.

    Raises:
        ValueError: `up` has a kernel larger than 1 x 1.
    """
    if up[0, 0].numel() != 1:
        raise ValueError(f"up has shape {tuple(up.shape)}; expected (out, r) or (out, r, 1, 1)")
    precision = torch.float32 if down.device.type == "mps" else torch.float64
    a, b = down.detach().flatten(1).to(precision), up.detach().flatten(1).to(precision)
    return abs(scale) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
