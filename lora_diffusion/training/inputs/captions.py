"""Encode captions with the frozen text encoders, once per caption.

Where text encoders or textual-inversion embeddings are trained, the denoiser encodes captions at each step instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_diffusion.models.load import Base
from lora_diffusion.models.offload import on_device
from lora_diffusion.models.text_encoding import TextContext, encode_prompts
from lora_diffusion.prompts.emphasis import ReadText, parse_literal
from lora_diffusion.training.inputs.cache import Cache, Tensors, content_key
from lora_diffusion.training.methods.injection import adapter_disabled


class CaptionEncoder:
    """Encoder of captions of any length, with a cache.

    Shorter captions of a batch are padded with chunks of the empty caption, so all have the same length.

    Args:
        base: The base whose text encoders are used.
        cache: Where encoded captions are stored.
        read: Parser of captions; by default they are taken literally, without emphasis such as `(word:1.3)`.
    """

    def __init__(self, base: Base, cache: Cache, read: ReadText = parse_literal) -> None:
        self.base, self.cache, self.read = base, cache, read
        self.identity = f"{base.hash} {base.pipe.unet.dtype}"

    @torch.no_grad()
    def encode(self, caption: str) -> Tensors:
        """Encode one caption with the frozen text encoders.

        The adapter is disabled, so the result depends on base and caption only and can be cached.

        Returns:
            On the CPU: `hidden` (tokens, width) and, for SDXL, `pooled` (width,).
        """

        def make() -> Tensors:
            with adapter_disabled(self.base), on_device(self.base, list(self.base.layout.text_layers)):
                context = encode_prompts(self.base, [caption], size_px=self.base.size_px, read=self.read)
            pooled = {"pooled": context.added["text_embeds"][0].cpu()} if context.added else {}
            return {"hidden": context.hidden[0].cpu(), **pooled}

        return self.cache.get(content_key("caption", self.identity, str(self.read(caption))), make)

    def encode_batch(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode a batch of captions: `hidden` (n, tokens, width) and, for SDXL, `pooled` (n, width)."""
        encoded = [self.encode(caption) for caption in captions]
        longest = max(one["hidden"].shape[0] for one in encoded)
        batch = {"hidden": torch.stack([self._pad(one["hidden"], longest) for one in encoded])}
        if "pooled" in encoded[0]:
            batch["pooled"] = torch.stack([one["pooled"] for one in encoded])
        return batch

    def _pad(self, hidden: Tensor, length: int) -> Tensor:
        if hidden.shape[0] == length:
            return hidden
        empty = self.encode("")["hidden"]
        return torch.cat([hidden, *[empty] * ((length - hidden.shape[0]) // empty.shape[0])])


def make_context(hidden: Tensor, pooled: Tensor | None, time_ids: Tensor) -> TextContext:
    """Make the conditioning of the UNet.

    Args:
        hidden: Hidden states of the captions, (n, tokens, width).
        pooled: For SDXL, the pooled embeddings (n, width); None for other families.
        time_ids: SDXL's size and crop conditioning, (n, 6); ignored without `pooled`.
    """
    if pooled is None:
        return TextContext(hidden=hidden)
    ids = time_ids.to(pooled.device, pooled.dtype)
    return TextContext(hidden=hidden, added={"text_embeds": pooled, "time_ids": ids})
