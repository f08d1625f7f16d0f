"""Adapter cards: what the studio shows of an adapter before it is added to the blend."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lora_diffusion.architectures.families import family_title
from lora_diffusion.errors import LoRADiffusionError
from lora_diffusion.library.entry import LibraryEntry
from lora_diffusion.workflows.adapters.inspect import inspect_adapter
from lora_diffusion_studio.view_models.adapter_slot import MAX_WEIGHT, MIN_WEIGHT


@dataclass(frozen=True, kw_only=True)
class AdapterCard:
    """Name, summary, preview image and weight range of one adapter in the library."""

    name: str
    """Path inside the library."""
    title: str
    trigger_words: tuple[str, ...]
    """Trigger words and learned textual inversion tokens."""
    kinds: tuple[str, ...]
    """Layer kinds, such as `LoRA` and `LoHa`."""
    summary: str
    """Kinds, rank and model family in one line."""
    preview: Path | None
    """Preview image beside the adapter file."""
    preferred_weight: float
    weight_range: tuple[float, float]
    """Minimum and maximum of the weight slider."""


def make_card(entry: LibraryEntry) -> AdapterCard:
    """Return the card of a library entry."""
    ranks = _describe_ranks(str(entry.path), entry.stamp)
    summary = ", ".join(filter(None, (" and ".join(entry.kinds), ranks, family_title(entry.family), entry.variant)))
    return AdapterCard(
        name=entry.relative,
        title=entry.name,
        trigger_words=(*entry.trigger_words, *entry.learned_tokens),
        kinds=entry.kinds,
        summary=summary,
        preview=entry.preview,
        preferred_weight=1.0 if entry.preferred_weight is None else entry.preferred_weight,
        weight_range=entry.weight_range or (MIN_WEIGHT, MAX_WEIGHT),
    )


@lru_cache(maxsize=4096)
def _describe_ranks(path: str, stamp: str) -> str:  # noqa: ARG001 (the stamp makes a changed file a new cache key)
    """Return `rank 8` or `ranks 4 to 16`; the empty string for an unreadable file or one without ranks."""
    try:
        ranks = inspect_adapter(Path(path))["ranks"]
    except LoRADiffusionError:
        return ""
    if not ranks:
        return ""
    lowest, highest = ranks["min"], ranks["max"]
    return f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
