"""T-LoRA: few directions where a picture is nearly noise, all of them where it is nearly done [arXiv:2507.05964].

At timestep t of T the first r(t) = least + floor((T - t) / T * (rank - least)) directions act. A subject of few
pictures then cannot copy their layout, which is decided in noise, at full strength.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.t_lora import rank_at_step
from lora_diffusion.training.methods.base import AdapterSize, AdditiveLayer, Frozen
from lora_diffusion.training.methods.fused_ops import cast_for_compute
from lora_diffusion.training.methods.lora import TrainableLoRA


class TrainableTLoRA(TrainableLoRA):
    """LoRA of which each sample uses the first directions, as many as its timestep says."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.sizes = size.config.least_rank, size.rank

    @property
    def active_directions(self) -> Tensor | None:
        """(n, r), true for each direction that a sample uses; None before the first pass."""
        return self.state.now.used.get(self.sizes)

    def output(self, module: Any, x: Tensor, frozen: Frozen) -> Tensor:
        return AdditiveLayer.output(self, module, x, frozen)  # the fused passes know no samples

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        down, up = (cast_for_compute(factor, x) for factor in (self.apply_rank_dropout(self.down), self.up))
        thin = functional.dropout(x, self.config.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            inner = self.mask_directions(module, cast_for_compute(thin, x), down)
            added = functional.linear(inner, up) if isinstance(module, nn.Linear) else functional.conv2d(inner, up)
        return self.current_scale * added

    def mask_directions(self, module: Any, x: Tensor, down: Tensor) -> Tensor:
        """What the first factor makes of the input, without the directions that rest."""
        if isinstance(module, nn.Linear):
            inner = functional.linear(x, down)
            return (
                inner
                if self.active_directions is None
                else inner * self.active_directions.to(inner.dtype).view(len(x), *[1] * (x.ndim - 2), -1)
            )
        inner = functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        return (
            inner
            if self.active_directions is None
            else inner * self.active_directions.to(inner.dtype)[:, :, None, None]
        )


def follow_timesteps(unet: nn.Module, updates: Sequence[TrainableTLoRA], timesteps: int) -> None:
    """Tell the updates, which are of one base, at each call of the UNet which timesteps its samples are at."""
    state, every_size = updates[0].state, {update.sizes for update in updates}

    def before_forward(_unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        at = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=sample.device)
        shares = 1 - at.float().expand(len(sample)) / timesteps
        masks: dict[tuple[int, int], Tensor] = {}
        for sizes in every_size:
            ranks = torch.tensor([rank_at_step(share, *sizes) for share in shares.tolist()], device=sample.device)
            masks[sizes] = torch.arange(sizes[1], device=sample.device) < ranks[:, None]
        state.now = replace(state.now, used=masks)

    unet.register_forward_pre_hook(before_forward, with_kwargs=True)
