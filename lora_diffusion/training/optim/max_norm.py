"""Keep every delta below a norm, so that no module drowns the others (kohya's `scale_weight_norms`)."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def limit_norms(pairs: Iterable[tuple[Tensor, Tensor, float]], largest: float) -> int:
    """Scale factors in place until every ||scale * up @ down||_F is at most `largest`; how many were scaled.

    Each pair is down (r, in) or (r, in, kh, kw), up (out, r) or (out, r, 1, 1), and the scale alpha / r. Both factors
    of a module that is too large are multiplied by sqrt(largest / norm), which keeps them as balanced as they were;
    all others keep their bits. All pairs must be on one device, which is waited for once.
    """
    modules = tuple(pairs)
    if not modules:
        return 0
    norms: list[float] = torch.stack([delta_norm(down, up, scale) for down, up, scale in modules]).tolist()
    too_large = [(pair, norm) for pair, norm in zip(modules, norms, strict=True) if norm > largest]
    for (down, up, _), norm in too_large:
        factor = (largest / norm) ** 0.5
        down.mul_(factor)
        up.mul_(factor)
    return len(too_large)


def delta_norm(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """||scale * up @ down||_F, a scalar, from two r x r Gram matrices: its square is scale^2 tr(up' up down down').

    In float64 where there is one, as the trace of the product loses digits if up and down nearly cancel.
    """
    if up[0, 0].numel() != 1:
        raise ValueError(f"up has shape {tuple(up.shape)}; expected (out, r) or (out, r, 1, 1)")
    precision = torch.float32 if down.device.type == "mps" else torch.float64
    a, b = down.detach().flatten(1).to(precision), up.detach().flatten(1).to(precision)
    return abs(scale) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
