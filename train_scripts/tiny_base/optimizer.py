"""Muon for the matrices, AdamW for the rest, and gradients averaged over processes.

Convolution kernels count as (out, in * k * k) matrices.
"""

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

NOT_MATRICES = ("embeddings", "conv_in", "conv_out", "quant_conv")


class MuonWithAdamW:
    """Muon [Jordan 2024, kellerjordan.github.io/posts/muon] beside AdamW, stepped as one.

    The work on the matrices is shared between processes: each orthogonalizes every n-th one.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], lr: float, *, weight_decay: float = 0.02):
        named = list(named)
        plain = [p for name, p in named if p.ndim < 2 or any(part in name for part in NOT_MATRICES)]
        plain_ids = {id(p) for p in plain}
        self.parameters = [p for _, p in named]
        self.matrices = [p for p in self.parameters if id(p) not in plain_ids]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(plain, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
        self.lr, self.weight_decay = lr, weight_decay

    def step(self, fraction_of_lr: float) -> None:
        """Average gradients over processes, clip to norm 1, update, clear."""
        if dist.is_initialized():
            average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.step_matrices(self.lr * fraction_of_lr)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * fraction_of_lr
        self.adam.step()
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step_matrices(self, lr: float) -> None:
        size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        updates = torch.zeros(sum(p.numel() for p in self.matrices))
        parts = updates.split([p.numel() for p in self.matrices])
        for i, (p, momentum, part) in enumerate(zip(self.matrices, self.momenta, parts, strict=True)):
            if p.grad is None:
                continue
            momentum.lerp_(p.grad, 0.05)
            if i % size == rank:
                nesterov = torch.lerp(p.grad, momentum, 0.95).reshape(p.shape[0], -1)
                part.copy_(orthogonalize(nesterov).reshape(-1) * 0.2 * max(nesterov.shape) ** 0.5)
        if size > 1:
            dist.all_reduce(updates)
        for p, part in zip(self.matrices, parts, strict=True):
            p.mul_(1 - lr * self.weight_decay).add_(part.view_as(p), alpha=-lr)


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five Newton-Schulz steps in bfloat16.

    Half the time of float32 on processors with bfloat16 units; others emulate them at a fiftieth of the speed.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    packed = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(packed)
    packed /= dist.get_world_size()
    for grad, part in zip(grads, packed.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


class Bfloat16Copy:
    """A copy of modules in bfloat16 that computes for the float32 originals, which the optimizer moves.

    On processors with bfloat16 units this is 1.2 (UNet) to 1.7 times (autoencoder) as fast as float32; autocast
    is slower than float32 there, because it casts at every normalization.
    """

    def __init__(self, *modules: nn.Module):
        self.modules = [copy.deepcopy(m).to(torch.bfloat16, memory_format=torch.channels_last) for m in modules]
        self.pairs = [
            (original, twin)
            for module, half in zip(modules, self.modules, strict=True)
            for original, twin in zip(module.parameters(), half.parameters(), strict=True)
        ]

    @torch.no_grad()
    def take_weights(self) -> None:
        """Round the originals' present weights into the copies."""
        for original, twin in self.pairs:
            twin.copy_(original)

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Move the copies' gradients to the originals."""
        for original, twin in self.pairs:
            original.grad = None if twin.grad is None else twin.grad.float()
            twin.grad = None


class Ema:
    """A running mean of the parameters; what is evaluated and kept."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.mean = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live values and means; call twice to come back."""
        for p, m in zip(self.parameters, self.mean, strict=True):
            kept = p.detach().clone()
            p.copy_(m)
            m.copy_(kept)


def learning_rate_fraction(step: int, steps: int, *, warmup: int = 40, hold: float = 0.45) -> float:
    """Linear warm-up, flat until `hold` of the run, then linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / max(1.0, steps * (1 - hold)))
