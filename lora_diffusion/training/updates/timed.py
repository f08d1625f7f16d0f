"""T-LoRA: few directions where a picture is nearly noise, all of them where it is nearly done [arXiv:2507.05964].

At timestep t of T the first r(t) = least + floor((T - t) / T * (rank - least)) directions act. A subject of few
pictures then cannot copy their layout, which is decided in noise, at full strength.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.blend import timed_rank
from lora_diffusion.training.updates.low_rank import LowRankUpdate
from lora_diffusion.training.updates.products import cast
from lora_diffusion.training.updates.update import Frozen, Size


class TimedUpdate(LowRankUpdate):
    """LoRA of which each sample uses the first directions, as many as its timestep says."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: Size, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.least = size.config.least_rank
        self.used: Tensor | None = None
        """(n, r), 1 for each direction that a sample uses."""

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        down, up = (cast(factor, x) for factor in (self.thinned(self.down) if self.training else self.down, self.up))
        with torch.autocast(x.device.type, enabled=False):
            inner = self.masked(module, cast(x, x), down)
            added = functional.linear(inner, up) if isinstance(module, nn.Linear) else functional.conv2d(inner, up)
        return frozen(module, x) + self.scale * added

    def masked(self, module: Any, x: Tensor, down: Tensor) -> Tensor:
        """What the first factor makes of the input, without the directions that rest."""
        if isinstance(module, nn.Linear):
            inner = functional.linear(x, down)
            return inner if self.used is None else inner * self.mask(inner).view(len(x), *[1] * (x.ndim - 2), -1)
        inner = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        return inner if self.used is None else inner * self.mask(inner)[:, :, None, None]

    def mask(self, inner: Tensor) -> Tensor:
        assert self.used is not None
        return self.used.to(inner.dtype)


def follow_timesteps(unet: nn.Module, updates: Sequence[TimedUpdate], timesteps: int) -> None:
    """Tell the updates at each call of the UNet which timesteps its samples are at."""

    def told(_unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        at = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=sample.device)
        shares = 1 - at.float().expand(len(sample)) / timesteps
        masks: dict[tuple[int, int], Tensor] = {}
        for update in updates:
            sizes = update.least, update.down.shape[0]
            if sizes not in masks:  # most updates are of one size
                ranks = torch.tensor([timed_rank(share, *sizes) for share in shares.tolist()], device=sample.device)
                masks[sizes] = torch.arange(sizes[1], device=sample.device) < ranks[:, None]
            update.used = masks[sizes]

    unet.register_forward_pre_hook(told, with_kwargs=True)
