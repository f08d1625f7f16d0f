"""T-LoRA [arXiv:2507.05964]: a LoRA whose rank grows as the noise falls.

At timestep t of T, the first r(t) = min_rank + floor((T - t) / T * (rank - min_rank)) directions are used. The layout
of a picture is decided at high noise, where the rank is low, so an adapter trained on few pictures of a subject copies
their layout less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.t_lora import rank_at_step
from lora_diffusion.inference.low_rank_forward import low_rank_forward
from lora_diffusion.training.methods.base import AdapterSize, AdditiveLayer, BaseForward
from lora_diffusion.training.methods.fused_ops import cast_for_compute
from lora_diffusion.training.methods.lora import TrainableLoRA


class TrainableTLoRA(TrainableLoRA):
    """LoRA in which each sample of a batch uses as many directions as its timestep allows."""

    def __init__(self, module: nn.Linear | nn.Conv2d, size: AdapterSize, generator: torch.Generator) -> None:
        super().__init__(module, size, generator)
        self.sizes = size.config.min_rank, size.rank

    @property
    def active_directions(self) -> Tensor | None:
        """Mask (n, r), true for each direction that a sample uses; None before the first call of the UNet."""
        return self.state.current.used.get(self.sizes)

    def output(self, module: Any, x: Tensor, base_forward: BaseForward) -> Tensor:
        """Compute the adapted output without the fused operations, which cannot mask directions by sample."""
        return AdditiveLayer.output(self, module, x, base_forward)

    def forward_delta(self, module: Any, x: Tensor) -> Tensor:
        """Compute scale * up @ mask(down @ dropout(x)), with the mask of each sample."""
        down, up = (cast_for_compute(factor, x) for factor in (self.apply_rank_dropout(self.down), self.up))
        x = cast_for_compute(functional.dropout(x, self.config.dropout, self.training), x)
        with torch.autocast(x.device.type, enabled=False):
            return low_rank_forward(module, x, down, up, scale=self.current_scale, rank_gates=self.active_directions)


def follow_timesteps(unet: nn.Module, layers: Sequence[TrainableTLoRA], timesteps: int) -> None:
    """Register a hook on the UNet that sets the rank masks of the layers from the timesteps of each call.

    Args:
        unet: The UNet that the layers are attached to.
        layers: All T-LoRA layers of one base; they share an `AdapterState`.
        timesteps: Number of timesteps that the base was trained with.
    """
    state, all_sizes = layers[0].state, {layer.sizes for layer in layers}

    def set_masks(_unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=sample.device)
        progress = 1 - timestep.float().expand(len(sample)) / timesteps
        masks: dict[tuple[int, int], Tensor] = {}
        for sizes in all_sizes:
            ranks = torch.tensor([rank_at_step(float(each), *sizes) for each in progress.cpu()], device=sample.device)
            masks[sizes] = torch.arange(sizes[1], device=sample.device) < ranks[:, None]
        state.current = replace(state.current, used=masks)

    unet.register_forward_pre_hook(set_masks, with_kwargs=True)
