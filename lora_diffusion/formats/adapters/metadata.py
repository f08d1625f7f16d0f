"""Read and write the metadata of adapter files: this library's record, ModelSpec keys and kohya's `ss_` keys.

ModelSpec 1.0.1 tells other programs what a file is [github.com/Stability-AI/ModelSpec]. kohya's `ss_` keys are what
A1111 and other user interfaces show [github.com/kohya-ss/sd-scripts].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata, adapter_hash
from lora_diffusion.architectures.families import FAMILIES
from lora_diffusion.config.settings import Settings, format_validation_error
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.safetensors import payload_hash

if TYPE_CHECKING:
    from torch import Tensor

RECORD_KEY = "lora_diffusion"
"""Metadata key of this library's record."""
_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""kohya's `ss_base_model_version` for each family."""


class Record(Settings):
    """The metadata entry that this library writes to its files."""

    metadata: AdapterMetadata
    alpha: Mapping[str, float] = {}
    """Alpha by module path, for formats that do not store it elsewhere."""
    hash: str = ""
    """Content hash of the adapter; empty for formats that may store tensors in another form."""


def read_record(entries: Mapping[str, str], source: str) -> Record | None:
    """Read this library's record from the metadata of a file.

    Args:
        entries: Metadata of the file.
        source: The path of the file, for error messages.

    Returns:
        The record, or None for a file of another tool.

    Raises:
        AdapterFormatError: If the record is damaged or of a newer version.
    """
    if RECORD_KEY not in entries:
        return None
    try:
        return Record.model_validate_json(entries[RECORD_KEY])
    except ValidationError as error:
        raise AdapterFormatError(
            f"{source}: metadata entry {RECORD_KEY!r} cannot be read ({format_validation_error(error, Record)}); "
            "the file may need a newer version of lora_diffusion"
        ) from None


def modelspec_entries(adapter: Adapter, tensors: Mapping[str, Tensor], *, title: str) -> dict[str, str]:
    """Return the ModelSpec metadata of an adapter.

    Args:
        adapter: The adapter.
        tensors: Its tensors as they are written to the file, for the payload hash.
        title: Value of `modelspec.title`.
    """
    metadata = adapter.metadata
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.hash_sha256": f"0x{payload_hash(tensors)}",
    }
    family = FAMILIES.get(metadata.family)
    if family:
        is_sd2_base = metadata.family == "sd2" and metadata.variant != "v-prediction"  # 512 px instead of 768 px
        entries["modelspec.architecture"] = "stable-diffusion-v2-512/lora" if is_sd2_base else family.modelspec
        entries["modelspec.resolution"] = "512x512" if is_sd2_base else f"{family.resolution}x{family.resolution}"
    optional = {
        "modelspec.prediction_type": "v" if metadata.variant == "v-prediction" else "",
        "modelspec.trigger_phrase": ", ".join(metadata.trigger_words),
        "modelspec.description": metadata.description,
        "modelspec.date": metadata.created,
        "modelspec.merged_from": ", ".join(metadata.merged_from),
    }
    return entries | {key: value for key, value in optional.items() if value}


def kohya_entries(adapter: Adapter) -> dict[str, str]:
    """Return kohya's `ss_` metadata of an adapter; entries that the adapter was loaded with take precedence."""
    metadata = adapter.metadata
    original = {key: str(value) for key, value in metadata.training.items() if key.startswith("ss_")}
    ranks = [rank for layer in adapter.layers.values() if isinstance(rank := getattr(layer, "rank", None), int)]
    alphas = [alpha for layer in adapter.layers.values() if isinstance(alpha := getattr(layer, "alpha", None), float)]
    is_lycoris = bool(set(adapter.kinds) - {"LoRA", "LoCon"})
    entries = {
        "ss_output_name": metadata.name,
        "ss_base_model_version": _BASE_VERSIONS.get(metadata.family, "") + _variant_suffix(metadata),
        "ss_v2": str(metadata.family == "sd2"),
        "ss_network_module": "lycoris.kohya" if is_lycoris else "networks.lora",
        "ss_network_dim": _common_or_dynamic(ranks),
        "ss_network_alpha": _common_or_dynamic(alphas),
        "ss_sd_model_name": metadata.base_name,
        "ss_training_comment": metadata.description,
    }
    return {key: value for key, value in entries.items() if value} | original


def _variant_suffix(metadata: AdapterMetadata) -> str:
    return "_v" if metadata.family == "sd2" and metadata.variant == "v-prediction" else ""


def _common_or_dynamic(values: list[Any]) -> str:
    """Return the common value, or `Dynamic`, which kohya's scripts write for mixed values."""
    if not values:
        return ""
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"


def parse_foreign_metadata(entries: Mapping[str, str]) -> AdapterMetadata:
    """Read the metadata of another tool's file; unknown entries and values are ignored."""
    family, variant = parse_base(entries)
    triggers = entries.get("modelspec.trigger_phrase", "")
    return AdapterMetadata(
        name=entries.get("ss_output_name") or entries.get("modelspec.title") or "",
        family=family,
        variant=variant,
        base_name=_read_unless_none(entries, "ss_sd_model_name"),
        base_hash=_read_unless_none(entries, "ss_new_sd_model_hash"),
        trigger_words=tuple(word for item in triggers.split(",") if (word := item.strip())),
        description=entries.get("modelspec.description") or _read_unless_none(entries, "ss_training_comment"),
        training={key: value for key, value in entries.items() if key.startswith("ss_")},
        created=entries.get("modelspec.date", ""),
        merged_from=tuple(name for name in entries.get("modelspec.merged_from", "").split(", ") if name),
    )


def _read_unless_none(entries: Mapping[str, str], key: str) -> str:
    """Return a metadata entry; empty if it is missing or `None`, which kohya's scripts write as text."""
    value = entries.get(key, "")
    return "" if value == "None" else value


def parse_base(entries: Mapping[str, str]) -> tuple[str, str]:
    """Read the family and variant (`v-prediction` or `inpainting`) of the base from the metadata.

    Each is empty if the metadata has no known value.
    """
    version = entries.get("ss_base_model_version", "")
    architecture = entries.get("modelspec.architecture", "")
    family = next((name for name, base in _BASE_VERSIONS.items() if version.startswith(base)), "")
    architectures = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl"}
    family = family or next((name for prefix, name in architectures.items() if architecture.startswith(prefix)), "")
    if "inpaint" in f"{version} {architecture}".lower():
        return family, "inpainting"
    is_v_prediction = (
        version.endswith("_v") or entries.get("modelspec.prediction_type") == "v" or "768-v" in architecture
    )
    return family, "v-prediction" if is_v_prediction else ""


def tag_frequencies(training: Mapping[str, Any]) -> dict[str, int]:
    """Return how often each tag occurred in the training captions, most frequent first.

    Args:
        training: Training metadata with kohya's `ss_tag_frequency`.

    Returns:
        Counts summed over all image folders; empty if the entry is missing or damaged.
    """
    try:
        folders = json.loads(training.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, TypeError, AttributeError):
        return {}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def record_entry(adapter: Adapter, *, alpha: Mapping[str, float], hashed: bool) -> dict[str, str]:
    """Return the metadata entry with this library's record.

    Args:
        adapter: The adapter.
        alpha: Alpha by module path, for a format that does not store it elsewhere.
        hashed: Whether to include the content hash, which `load_adapter` then checks.
    """
    digest = adapter_hash(adapter) if hashed else ""
    return {RECORD_KEY: Record(metadata=adapter.metadata, alpha=alpha, hash=digest).model_dump_json()}
