"""Captions as the UNet reads them: encoded once where the text encoders are frozen, at each step where they learn."""

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
    """Encodes captions of any length; all of a batch come out equally long, padded with chunks of the empty caption."""

    def __init__(self, base: Base, cache: Cache, read: ReadText = parse_literal) -> None:
        self.base, self.cache, self.read = base, cache, read
        self.identity = f"{base.hash} {base.pipe.unet.dtype}"

    @torch.no_grad()
    def encode(self, caption: str) -> Tensors:
        """Hidden states (tokens, width) and, for SDXL, the pooled ones (width,) of one caption, on the CPU.

        By the frozen encoders, whatever has been trained meanwhile: an entry depends on base and caption alone.
        """

        def make() -> Tensors:
            with adapter_disabled(self.base), on_device(self.base, list(self.base.layout.text_layers)):
                context = encode_prompts(self.base, [caption], size_px=self.base.size_px, read=self.read)
            pooled = {"pooled": context.added["text_embeds"][0].cpu()} if context.added else {}
            return {"hidden": context.hidden[0].cpu(), **pooled}

        return self.cache.get(content_key("caption", self.identity, str(self.read(caption))), make)

    def encode_batch(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The same for a batch, each with a dimension in front."""
        found = [self.encode(caption) for caption in captions]
        longest = max(one["hidden"].shape[0] for one in found)
        batch = {"hidden": torch.stack([self.pad(one["hidden"], longest) for one in found])}
        if "pooled" in found[0]:
            batch["pooled"] = torch.stack([one["pooled"] for one in found])
        return batch

    def pad(self, hidden: Tensor, length: int) -> Tensor:
        if hidden.shape[0] == length:
            return hidden
        empty = self.encode("")["hidden"]
        return torch.cat([hidden, *[empty] * ((length - hidden.shape[0]) // empty.shape[0])])


def make_context(hidden: Tensor, pooled: Tensor | None, time_ids: Tensor) -> TextContext:
    """What the UNet is conditioned on: text, and for SDXL pooled text and the picture's measures (n, 6) as well."""
    if pooled is None:
        return TextContext(hidden=hidden)
    ids = time_ids.to(pooled.device, pooled.dtype)
    return TextContext(hidden=hidden, added={"text_embeds": pooled, "time_ids": ids})
