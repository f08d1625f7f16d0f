"""The forward pass of the low-rank delta of one module, in plain differentiable operations.

    y = scale * up @ (gates * (down @ x))   [arXiv:2106.09685]

This is the reference for the faster paths: the fused operations of training (`training.methods.fused_ops`), and the
stacked factors that are added in place in sampling (`inference.parallel`). Tests compare them to it.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def low_rank_forward(
    module: Any, x: Tensor, down: Tensor, up: Tensor, *, scale: float = 1.0, rank_gates: Tensor | None = None
) -> Tensor:
    """Compute what a low-rank delta adds to the output of a module.

    Args:
        module: `nn.Linear` or `nn.Conv2d` (one group); a convolution gives its stride, padding and dilation.
        x: Input of the module, (n, ..., in) or (n, in, h, w).
        down: Factor (r, in) or (r, in, kh, kw), in the dtype to compute in.
        up: Factor (out, r) or (out, r, 1, 1), in the dtype to compute in.
        scale: Multiplier of the product of the factors.
        rank_gates: Multiplier of each direction for each sample, (n, r), or for all samples, (1, r); None for ones.
            Booleans select directions.

    Returns:
        Output (n, ..., out) or (n, out, h', w'), without the output of the module itself.
    """
    if isinstance(module, nn.Linear):
        hidden = functional.linear(x, down)
        delta = functional.linear(_apply_gates(hidden, rank_gates, [*[1] * (x.ndim - 2), -1]), up)
    else:
        hidden = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        delta = functional.conv2d(_apply_gates(hidden, rank_gates, [-1, 1, 1]), up)
    return delta if scale == 1 else scale * delta


def _apply_gates(hidden: Tensor, rank_gates: Tensor | None, shape: list[int]) -> Tensor:
    """Multiply the output of `down` by the gates, each sample's reshaped to `shape`."""
    if rank_gates is None:
        return hidden
    return hidden * rank_gates.to(hidden.dtype).view(rank_gates.shape[0], *shape)
