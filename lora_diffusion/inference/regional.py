"""Limit adapters to regions of the image, by masking their contribution to the output of each UNet layer.

For layers with a spatial output y, each region adds its delta times its mask, resized to the resolution of the layer.

Keys and values of cross-attention are computed from the prompt and have no position in the image. Each cross-attention
layer is therefore evaluated once without regional deltas (y_0) and once per region (y_r), with the keys and values of
that region and with the prompt encoded by that region's text encoders:

    y = y_0 + sum over regions r of mask_r * (y_r - y_0)

The pooled text embedding of SDXL, which is added to the time embedding, has no position either; it is shared by the
whole image.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.masks import infer_token_grid, resize_mask
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.parallel import ModuleDelta, build_delta
from lora_diffusion.models.forward_overrides import Forward, ForwardOverrides
from lora_diffusion.models.load import Base, module_at

CROSS_ATTENTION_KV = re.compile(r"\.attn2\.to_[kv]$")
"""Matches the paths of the key and value projections of cross-attention, whose input is the prompt."""
NON_SPATIAL = re.compile(r"time_emb|time_embedding|add_embedding")
"""Matches the paths of modules whose output has no position in the image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionalDelta:
    """The deltas of one region of the image."""

    deltas: BlendSum
    """Deltas of UNet modules."""
    mask: Tensor = field(repr=False)
    """Weight of the region at each position, (height, width); resized to the resolution of each layer."""
    prompt: Tensor | None = field(default=None, repr=False)
    """Hidden states of the region's prompt in the UNet's batch order; None to use those given to the UNet."""


def check_spatial(deltas: BlendSum) -> None:
    """Check that all deltas belong to modules whose output has positions in the image.

    Raises:
        ConfigError: If a module of the time or text embedding is changed.
    """
    path = next((path for path in sorted({*deltas.layers, *deltas.biases}) if NON_SPATIAL.search(path)), None)
    if path:
        raise ConfigError(
            f"{path}: acts on the whole image and cannot be limited to a region; exclude this module, or use the "
            "adapter without a region"
        )


class RegionalPatch:
    """Applies regional deltas to the modules of a UNet; opened and undone by `regional_patch`."""

    def __init__(self, base: Base, size: tuple[int, int]) -> None:
        """Create a patch without regions.

        Args:
            base: Base model.
            size: Height and width of the latents.
        """
        self.base = base
        self.size = size
        self._forwards = ForwardOverrides()
        self._masks: dict[tuple[RegionalDelta, tuple[int, ...]], Tensor] = {}
        """Masks resized so far, by region and output shape."""
        self._kv_region: int | None = None
        """Index of the region whose keys and values cross-attention computes; None for no region."""

    def apply(self, regions: Sequence[RegionalDelta], outside: Tensor | None = None) -> None:
        """Replace the current regions.

        Args:
            regions: Deltas, mask and prompt of each region.
            outside: Hidden states of the prompt outside all regions; None to use those given to the UNet.

        Raises:
            ConfigError: If a DoRA layer is to be applied to a quantized weight.
        """
        self.undo()
        paths = sorted({path for region in regions for path in (*region.deltas.layers, *region.deltas.biases)})
        for path in paths:
            module = module_at(self.base, path)
            module_deltas = [
                build_delta(module, path, [region.deltas])
                if path in region.deltas.layers or path in region.deltas.biases
                else None
                for region in regions
            ]
            if CROSS_ATTENTION_KV.search(path):
                forward = self._wrap_kv_projection(module.forward, module_deltas)
            else:
                forward = self._wrap_spatial(module.forward, module_deltas, regions)
            self._forwards.replace(module, forward)
        candidates = changeable_paths(self.base.layout) if outside is not None else paths
        for path in {path.rpartition(".")[0] for path in candidates if CROSS_ATTENTION_KV.search(path)}:
            attention = module_at(self.base, path)
            self._forwards.replace(attention, self._wrap_attention(attention.forward, regions, outside))

    def _wrap_spatial(
        self,
        original_forward: Forward,
        module_deltas: Sequence[ModuleDelta | None],
        regions: Sequence[RegionalDelta],
    ) -> Forward:
        """Return the forward method of a module with spatial output: each delta is multiplied by its region's mask."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = original_forward(x, *args, **kwargs)
            for module_delta, region in zip(module_deltas, regions, strict=True):
                if module_delta is not None:
                    y = y + self._resized_mask(y, region) * (module_delta.add_to(x, y.clone()) - y)
            return y

        return forward

    def _wrap_kv_projection(self, original_forward: Forward, module_deltas: Sequence[ModuleDelta | None]) -> Forward:
        """Return the forward method of a key or value projection: it uses the delta of the current region only."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = original_forward(x, *args, **kwargs)
            module_delta = module_deltas[self._kv_region] if self._kv_region is not None else None
            return y if module_delta is None else module_delta.add_to(x, y)

        return forward

    def _wrap_attention(
        self, original_forward: Forward, regions: Sequence[RegionalDelta], outside: Tensor | None
    ) -> Forward:
        """Return the forward method of a cross-attention layer, evaluated once without regions and once per region."""

        def forward(x: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def attend(prompt: Tensor | None) -> Tensor:
                return original_forward(x, encoder_hidden_states if prompt is None else prompt, *args, **kwargs)

            y_outside = y = attend(outside)
            for index, region in enumerate(regions):
                self._kv_region = index
                try:
                    y = y + self._resized_mask(y_outside, region) * (attend(region.prompt) - y_outside)
                finally:
                    self._kv_region = None
            return y

        return forward

    def _resized_mask(self, y: Tensor, region: RegionalDelta) -> Tensor:
        """Resize a region's mask to an output of shape (batch, tokens, width) or (batch, channels, height, width)."""
        shape = tuple(y.shape[2:]) if y.ndim == 4 else (y.shape[1],)
        if (region, shape) not in self._masks:
            rows, columns = shape if len(shape) == 2 else infer_token_grid(shape[0], *self.size)
            mask = resize_mask(region.mask, rows, columns).to(y.device, y.dtype)
            self._masks[region, shape] = mask if len(shape) == 2 else mask.reshape(1, -1, 1)
        return self._masks[region, shape]

    def undo(self) -> None:
        """Remove all regions and put back the previous forward methods."""
        self._forwards.restore()
        self._masks.clear()


@contextmanager
def regional_patch(base: Base, size: tuple[int, int]) -> Generator[RegionalPatch]:
    """Open a patch that applies regional deltas to the UNet; it is removed when the context exits.

    Gradients are disabled inside.

    Args:
        base: Base model.
        size: Height and width of the latents.
    """
    patch = RegionalPatch(base, size)
    try:
        with torch.no_grad():
            yield patch
    finally:
        patch.undo()
