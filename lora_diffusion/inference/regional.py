"""Adapters that act in parts of the picture: in every layer, a side's output counts as its mask says there.

The keys and values of cross-attention come from the prompt, which has no place in the picture. So an attention that
reads the prompt is run once for each region, with that region's keys and values and with the prompt as that region's
text encoders read it, and once without; what a region changes counts as its mask says.

    y = y_0 + sum over regions of mask * (y_region - y_0)

SDXL's pooled text vector, which is added to the time, is the whole picture's.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.masks import infer_token_grid, resize_mask
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.parallel import Forward, ForwardOverrides, ParallelDelta, add_delta, build_delta
from lora_diffusion.models.load import Base, module_at

PROMPT_READERS = re.compile(r"\.attn2\.to_[kv]$")
PLACELESS = re.compile(r"time_emb|time_embedding|add_embedding")


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionalDelta:
    """What acts in one region: the terms of its adapters in the UNet, and its mask (SIDE, SIDE)."""

    total: BlendSum
    mask: Tensor
    prompt: Tensor | None = None
    """The prompt as its text encoders read it, in the order of the UNet's batch; None if they are everybody's."""


def check_spatial(total: BlendSum) -> None:
    """Raise ConfigError for layers that have no place in a picture."""
    placeless = next((path for path in sorted({*total.layers, *total.biases}) if PLACELESS.search(path)), None)
    if placeless:
        raise ConfigError(f"{placeless}: acts on the whole picture, so that no region holds it; leave it out")


class RegionalPatch:
    """A UNet whose modules add regional deltas to their outputs; `regional_patch` opens one and removes it."""

    def __init__(self, base: Base, size: tuple[int, int]) -> None:
        self.base = base
        self.size = size
        """Height and width of the latents."""
        self.forwards = ForwardOverrides()
        self.masks: dict[tuple[RegionalDelta, tuple[int, ...]], Tensor] = {}
        """Masks at the resolutions that were asked for so far."""
        self.reading: int | None = None
        """The lane whose keys and values the prompt's readers use now; None is none."""

    def apply(self, lanes: Sequence[RegionalDelta], outside: Tensor | None = None) -> None:
        """Put these lanes in the place of any before; `outside` is the prompt as it is read outside of all of them."""
        self.undo()
        paths = sorted({path for lane in lanes for path in (*lane.total.layers, *lane.total.biases)})
        for path in paths:
            module = module_at(self.base, path)
            held = [path in lane.total.layers or path in lane.total.biases for lane in lanes]
            sides = [
                build_delta(module, path, [lane.total]) if has else None for lane, has in zip(lanes, held, strict=True)
            ]
            make = self.wrap_prompt_reader if PROMPT_READERS.search(path) else self.wrap_spatial
            self.forwards.replace(module, make(module, module.forward, sides, lanes))
        everywhere = changeable_paths(self.base.layout) if outside is not None else paths
        for path in {path.rpartition(".")[0] for path in everywhere if PROMPT_READERS.search(path)}:
            attention = module_at(self.base, path)
            self.forwards.replace(attention, self.wrap_attention(attention.forward, lanes, outside))

    def wrap_spatial(
        self, module: nn.Module, own: Forward, sides: Sequence[ParallelDelta | None], lanes: Sequence[RegionalDelta]
    ) -> Forward:
        """A module whose output has places: each side counts as its mask says there."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = own(x, *args, **kwargs)
            for side, lane in zip(sides, lanes, strict=True):
                if side is not None:
                    y = y + self.mask_for(y, lane) * (add_delta(module, x, y.clone(), side) - y)
            return y

        return forward

    def wrap_prompt_reader(
        self, module: nn.Module, own: Forward, sides: Sequence[ParallelDelta | None], _lanes: Sequence[RegionalDelta]
    ) -> Forward:
        """A module that reads the prompt: it has the side of the lane that is read now."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = own(x, *args, **kwargs)
            side = sides[self.reading] if self.reading is not None else None
            return y if side is None else add_delta(module, x, y, side)

        return forward

    def wrap_attention(self, own: Forward, lanes: Sequence[RegionalDelta], outside: Tensor | None) -> Forward:
        """An attention that reads the prompt: once as it is outside, and once for each region."""

        def forward(x: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def attend(prompt: Tensor | None) -> Tensor:
                return own(x, encoder_hidden_states if prompt is None else prompt, *args, **kwargs)

            bare = y = attend(outside)
            for number, lane in enumerate(lanes):
                self.reading = number
                try:
                    y = y + self.mask_for(bare, lane) * (attend(lane.prompt) - bare)
                finally:
                    self.reading = None
            return y

        return forward

    def mask_for(self, y: Tensor, lane: RegionalDelta) -> Tensor:
        """The lane's mask at the resolution of an output (n, tokens, width) or (n, channels, h, w)."""
        shape = tuple(y.shape[2:]) if y.ndim == 4 else (y.shape[1],)
        if (lane, shape) not in self.masks:
            rows, columns = shape if len(shape) == 2 else infer_token_grid(shape[0], *self.size)
            mask = resize_mask(lane.mask, rows, columns).to(y.device, y.dtype)
            self.masks[lane, shape] = mask if len(shape) == 2 else mask.reshape(1, -1, 1)
        return self.masks[lane, shape]

    def undo(self) -> None:
        """Take every lane away."""
        self.forwards.restore()
        self.masks.clear()


@contextmanager
def regional_patch(base: Base, size: tuple[int, int]) -> Iterator[RegionalPatch]:
    """Lanes beside the UNet's modules, for latents of (height, width); gone afterwards, whatever happens inside."""
    lanes = RegionalPatch(base, size)
    try:
        with torch.no_grad():
            yield lanes
    finally:
        lanes.undo()
