"""Max-norm regularization: keep the norm of every delta below a limit (kohya's `scale_weight_norms`)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_diffusion.algebra.metrics.norms import low_rank_norm


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
    on_device = torch.stack([low_rank_norm(down, up, scale) for down, up, scale in modules])
    norms = [float(norm) for norm in on_device.cpu()]  # one transfer for all modules
    too_large = [(pair, norm) for pair, norm in zip(modules, norms, strict=True) if norm > largest]
    for (down, up, _), norm in too_large:
        factor = (largest / norm) ** 0.5
        down.mul_(factor)
        up.mul_(factor)
    return len(too_large)
