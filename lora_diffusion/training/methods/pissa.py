"""PiSSA: the base's own main directions are trained [arXiv:2404.02948].

The paper takes them out of the base. Here the base stays as it is, and what the factors began with is subtracted:

    B A - B0 A0 = (B - B0) A + B0 (A - A0)

The right side has the same gradients, is nothing at the start to the bit, and rounds relative to what was learned and
not to the base. It is saved as plain LoRA of twice the rank, [B - B0, B0] after [A; A - A0].
"""

import torch
from torch import Tensor, nn

from lora_diffusion.errors import ConfigError
from lora_diffusion.training.methods.base import AdapterSize, make_parameter
from lora_diffusion.training.methods.lora import TrainableLoRA

SVD_ITERATIONS = 4
"""Subspace iterations of the randomized SVD; the paper's fast variant takes as many or more."""
OVERSAMPLED = 16
"""Directions beyond the rank that the randomized SVD looks at, so that the last ones are right too."""


class TrainablePiSSA(TrainableLoRA):
    """LoRA that begins as the strongest part of the weight."""

    repeated = 2
    down_start: Tensor
    up_start: Tensor

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        if module.weight.ndim > 2 and module.weight[0, 0].numel() > 1:
            raise ConfigError(
                "adapter.start 'pissa' takes a matrix's main directions, and a convolution's kernel has none of its "
                "own; leave convolutions out of adapter.unet_targets, or set adapter.start to zero"
            )
        super().__init__(module, size, generator)
        down, up = compute_pissa_factors(
            module.weight.detach().float().flatten(1), self.down.shape[0], size.scale, generator
        )
        self.down = make_parameter(down.reshape(down.shape[0], *self.down.shape[1:]), module)
        self.up = make_parameter(up.reshape(up.shape[0], up.shape[1], *self.up.shape[2:]), module)
        self.register_buffer("down_start", self.down.detach().clone(), persistent=False)
        self.register_buffer("up_start", self.up.detach().clone(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        down = torch.cat([self.down, self.down - self.down_start])
        return down, torch.cat([self.up - self.up_start, self.up_start], dim=1)


def compute_pissa_factors(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`down` (r, in) and `up` (out, r) with scale * up @ down the strongest part of a matrix (out, in).

    Seeded, as torch's own randomized SVD draws from the global generator.
    """
    width = min(rank + OVERSAMPLED, *weight.shape)
    probes = torch.randn(weight.shape[1], width, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ probes).Q
    for _ in range(SVD_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], (basis @ left)[:, :rank] * root
