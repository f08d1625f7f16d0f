"""PiSSA [arXiv:2404.02948]: LoRA that starts from the principal singular directions of the base weight.

The paper subtracts the initial product B0 A0 from the base weight. Here the base stays unchanged, and the product is
subtracted in the adapter:

    B A - B0 A0 = (B - B0) A + B0 (A - A0)

The right-hand side has the same gradients, is exactly zero at the start, and its rounding error is relative to what was
learned and not to the base weight. The file is plain LoRA of twice the rank, with up = [B - B0, B0] and
down = [A; A - A0].
"""

import torch
from torch import Tensor, nn

from lora_diffusion.algebra.svd.randomized_svd import randomized_svd
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.methods.base import AdapterSize, make_parameter
from lora_diffusion.training.methods.lora import TrainableLoRA

_SVD_ITERATIONS = 4
"""Subspace iterations of the randomized SVD; the paper's fast variant uses at least as many."""
_OVERSAMPLING = 16
"""Directions beyond the rank that the randomized SVD computes, so that the last ones it returns are accurate too."""


class TrainablePiSSA(TrainableLoRA):
    """LoRA initialized with the principal part of the weight, which is subtracted from the delta.

    Raises:
        ConfigError: The module is a convolution with a kernel larger than 1 x 1.
    """

    repeated = 2
    down_start: Tensor
    """A0, the initial `down` (r, in)."""
    up_start: Tensor
    """B0, the initial `up` (out, r)."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        if module.weight.ndim > 2 and module.weight[0, 0].numel() > 1:
            raise ConfigError(
                "adapter.init_weights 'pissa' needs the singular vectors of a matrix and does not support convolutions "
                "with a kernel larger than 1 x 1; remove convolutions from adapter.unet_target_modules, or set "
                "adapter.init_weights to zero"
            )
        super().__init__(module, size, generator)
        down, up = _compute_pissa_factors(
            module.weight.detach().float().flatten(1), self.down.shape[0], size.scale, generator
        )
        self.down = make_parameter(down.reshape(down.shape[0], *self.down.shape[1:]), module)
        self.up = make_parameter(up.reshape(up.shape[0], up.shape[1], *self.up.shape[2:]), module)
        self.register_buffer("down_start", self.down.detach().clone(), persistent=False)
        self.register_buffer("up_start", self.up.detach().clone(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return [A; A - A0] (2r, in) and [B - B0, B0] (out, 2r)."""
        down = torch.cat([self.down, self.down - self.down_start])
        return down, torch.cat([self.up - self.up_start, self.up_start], dim=1)


def _compute_pissa_factors(
    weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Compute `down` (r, in) and `up` (out, r) so that scale * up @ down approximates the weight best.

    Uses a randomized SVD with its own generator, because `torch.svd_lowrank` draws from the global one.
    """
    width = min(rank + _OVERSAMPLING, *weight.shape)
    left, singular_values, right = randomized_svd(weight, width, power_iterations=_SVD_ITERATIONS, generator=generator)
    root = (singular_values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
