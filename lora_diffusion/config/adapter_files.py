"""Settings of the commands that rewrite adapter files: convert, extract, prune and pack."""

from typing import Annotated, Literal

from pydantic import Field

from lora_diffusion.config.combine import RankRule
from lora_diffusion.config.merge import WeightType
from lora_diffusion.config.settings import Dialect, IgnoredKeys, Positive, Settings

SVDMethod = Literal["exact", "randomized"]
"""How singular values are computed: in full, or from a seeded random sketch."""
PrunedPart = Literal["factors", "delta"]
"""What is pruned: the low-rank factors `down` and `up`, or their product."""
PruneScope = Literal["module", "adapter"]
"""Whether the smallest entries are selected within each module or within the whole adapter.

With `module`, the default, every module keeps the same fraction of entries, so none is emptied: a small delta is not an
unimportant one, because the norms of different modules say little about their effect on an image. With `adapter`, the
error over all deltas together is smaller for the same fraction, at the cost of modules with small deltas.
"""


class ConvertConfig(Settings):
    """Settings of converting adapter files."""

    to: Dialect
    """Dialect to write: native (PEFT and diffusers), kohya (A1111, Forge, ComfyUI), or embedding (textual inversion
    only)."""
    dtype: WeightType = "keep"
    """Dtype of the written tensors; `keep` is that of the input."""
    force: bool = False
    """Replace existing output files."""
    without_tokens: bool = False
    """Leave out textual-inversion embeddings."""
    card: bool = False
    """Also write a model card for the Hugging Face Hub beside each file."""
    ignore_unmatched: IgnoredKeys = ()


class ExtractConfig(Settings):
    """Settings of extracting an adapter from a checkpoint."""

    rule: RankRule
    """Rule that chooses the rank of each module."""
    method: SVDMethod = "exact"
    """SVD of each module: exact, or randomized (seeded; only with --rank, for modules much larger than the rank)."""
    unet_target_modules: tuple[str, ...] = ("all",)
    """Modules of the UNet to include: named sets or patterns, as in training; give the flag alone for none."""
    text_encoder_target_modules: tuple[str, ...] = ("all",)
    """Modules of the text encoders to include: named sets or patterns; give the flag alone for none."""
    norms_and_biases: Literal["leave", "keep"] = "leave"
    """Whether norms and biases that differ are left out, or kept in full in float32; not every program reads them."""
    dtype: WeightType = "keep"
    """Dtype of the factors; `keep` is that of the checkpoints, or float32 if they differ."""
    force: bool = False
    """Replace an existing output file."""


class PruneConfig(Settings):
    """Settings of pruning an adapter."""

    keep: Annotated[float, Field(gt=0, le=1)]
    """Fraction of entries to keep, above 0 and at most 1; the smallest others are set to 0."""
    what: PrunedPart = "factors"
    """Prune the factors down and up (plain LoRA; the rank stays), or the delta (any kind but DoRA)."""
    scope: PruneScope = "module"
    """Keep the fraction in each module, or over the whole adapter: that loses less, but may empty weak modules."""
    dtype: WeightType = "keep"
    """Dtype of the written tensors; `keep` is that of the input."""
    force: bool = False
    """Replace an existing output file."""


class PackConfig(Settings):
    """Settings of packing adapters into one file with shared factors."""

    rank: Positive
    """Rank of the shared factors; the pack is exact if this is at least the sum of the adapters' ranks."""
    dtype: WeightType = "keep"
    """Dtype of the written tensors; `keep` is that of the adapters, or float32 if they differ."""
    force: bool = False
    """Replace an existing output file."""
