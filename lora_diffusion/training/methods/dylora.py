"""DyLoRA: the first b directions are trained to do alone, for every b up to the rank [arXiv:2210.07558].

Each step draws one b for all modules and trains direction b, with those before it as they are (the paper's frozen
variant, which is the cheaper and its default). Cutting the file to any rank is then no approximation.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.training.methods.base import AdapterSize
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.methods.lora import TrainableLoRA


class TrainableDyLoRA(TrainableLoRA):
    """LoRA of which a step uses the first directions."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.used = self.shown = size.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """The first few directions; in training the last of them learns."""
        if not self.training:
            return self.down[: self.shown], self.up[:, : self.shown]
        last = self.used - 1
        down = torch.cat([self.down[:last].detach(), self.down[last : self.used]])
        up = torch.cat([self.up[:, :last].detach(), self.up[:, last : self.used]], dim=1)
        return down, up

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


class DyLoRACallbacks(MethodCallbacks):
    """Draws the number of directions of each step."""

    def __init__(self, updates: Sequence[TrainableDyLoRA], seed: int) -> None:
        self.updates, self.seed = updates, seed

    def before_step(self, step: int) -> None:
        draw = torch.rand((), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step))
        for update in self.updates:
            update.used = 1 + int(draw * update.down.shape[0])

    @contextmanager
    def truncated_to(self, rank: int) -> Iterator[None]:
        """Evaluate with the first directions alone."""
        for update in self.updates:
            update.shown = min(rank, update.down.shape[0])
        try:
            yield
        finally:
            for update in self.updates:
                update.shown = update.down.shape[0]

    def truncations(self) -> dict[int, AbstractContextManager[None]]:
        """The powers of two, and the whole."""
        most = max(update.down.shape[0] for update in self.updates)
        ranks = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
        return {rank: self.truncated_to(rank) for rank in ranks}

    def report(self) -> dict[str, Any]:
        return {"ranks_to_choose_from": max(update.down.shape[0] for update in self.updates)}
