"""DyLoRA [arXiv:2210.07558]: a LoRA that can be truncated to any lower rank after training.

Each step draws one rank b for all modules and trains direction b with the directions before it frozen. This is the
paper's frozen variant, its default and the cheaper one. For every b, the first b directions are thereby trained to work
alone, so that truncating the file to rank b is exact.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.core.seeding import make_generator
from lora_diffusion.training.methods.base import AdapterSize
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.methods.lora import TrainableLoRA


class TrainableDyLoRA(TrainableLoRA):
    """LoRA that uses its first `training_rank` directions in training and `eval_rank` in evaluation."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.training_rank = self.eval_rank = size.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors truncated to the current rank; in training only the last direction has a gradient."""
        if not self.training:
            return self.down[: self.eval_rank], self.up[:, : self.eval_rank]
        rank = self.training_rank
        down = torch.cat([self.down[: rank - 1].detach(), self.down[rank - 1 : rank]])
        up = torch.cat([self.up[:, : rank - 1].detach(), self.up[:, rank - 1 : rank]], dim=1)
        return down, up

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors at full rank."""
        return self.down, self.up


class DyLoRACallbacks(MethodCallbacks):
    """Draws the rank of each training step."""

    def __init__(self, layers: Sequence[TrainableDyLoRA], seed: int) -> None:
        self.layers, self.seed = layers, seed

    def before_step(self, step: int) -> None:
        """Draw the rank of a step, as a function of the seed and the step alone."""
        fraction = torch.rand((), generator=make_generator(self.seed, f"dylora {step}"))
        for layer in self.layers:
            layer.training_rank = 1 + int(fraction * layer.down.shape[0])

    @contextmanager
    def truncate(self, rank: int) -> Generator[None]:
        """Evaluate all layers with their first `rank` directions inside the context."""
        for layer in self.layers:
            layer.eval_rank = min(rank, layer.down.shape[0])
        try:
            yield
        finally:
            for layer in self.layers:
                layer.eval_rank = layer.down.shape[0]

    def truncations(self) -> dict[int, AbstractContextManager[None]]:
        """Return contexts for the powers of two below the full rank, and for the full rank."""
        max_rank = max(layer.down.shape[0] for layer in self.layers)
        ranks = [2**power for power in range(max_rank.bit_length()) if 2**power < max_rank] + [max_rank]
        return {rank: self.truncate(rank) for rank in ranks}

    def report(self) -> dict[str, Any]:
        """Return the largest rank that the file can be truncated to."""
        return {"ranks_to_choose_from": max(layer.down.shape[0] for layer in self.layers)}
