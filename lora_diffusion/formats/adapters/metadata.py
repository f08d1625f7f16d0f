"""The texts in a file's header: our own record, ModelSpec's keys, kohya's; written strictly, read tolerantly.

ModelSpec 1.0.1 [github.com/Stability-AI/ModelSpec] tells other programs what a file is; kohya's `ss_` keys are what
user interfaces show [github.com/kohya-ss/sd-scripts].
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
BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""kohya's name of each family's base."""


class Record(Settings):
    """Our own header entry."""

    metadata: AdapterMetadata
    alpha: Mapping[str, float] = {}
    """By module path, where the file's layout has no other place for it."""
    hash: str = ""
    """Content hash of the adapter; empty where the layout stores it in other words."""


def read_record(entries: Mapping[str, str], source: str) -> Record | None:
    """Our own header entry; None for other tools' files. Raises AdapterFormatError if it cannot be read."""
    if RECORD_KEY not in entries:
        return None
    try:
        return Record.model_validate_json(entries[RECORD_KEY])
    except ValidationError as error:
        raise AdapterFormatError(
            f"{source}: header entry {RECORD_KEY!r} cannot be read ({format_validation_error(error, Record)}); "
            "written by a newer version?"
        ) from None


def modelspec_entries(adapter: Adapter, tensors: Mapping[str, Tensor], *, title: str) -> dict[str, str]:
    """ModelSpec's required keys, and the optional ones that are known."""
    metadata = adapter.metadata
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.hash_sha256": f"0x{payload_hash(tensors)}",
    }
    family = FAMILIES.get(metadata.family)
    if family:
        small = metadata.family == "sd2" and metadata.variant != "v-prediction"  # SD 2.x comes in two sizes
        entries["modelspec.architecture"] = "stable-diffusion-v2-512/lora" if small else family.modelspec
        entries["modelspec.resolution"] = "512x512" if small else f"{family.resolution}x{family.resolution}"
    optional = {
        "modelspec.prediction_type": "v" if metadata.variant == "v-prediction" else "",
        "modelspec.trigger_phrase": ", ".join(metadata.trigger_words),
        "modelspec.description": metadata.description,
        "modelspec.date": metadata.created,
        "modelspec.merged_from": ", ".join(metadata.merged_from),
    }
    return entries | {key: value for key, value in optional.items() if value}


def kohya_entries(adapter: Adapter) -> dict[str, str]:
    """The `ss_` keys that other user interfaces show, over those that the adapter came with."""
    metadata = adapter.metadata
    kept = {key: str(value) for key, value in metadata.training.items() if key.startswith("ss_")}
    ranks = [rank for layer in adapter.layers.values() if isinstance(rank := getattr(layer, "rank", None), int)]
    alphas = [alpha for layer in adapter.layers.values() if isinstance(alpha := getattr(layer, "alpha", None), float)]
    lycoris = bool(set(adapter.kinds) - {"LoRA", "LoCon"})
    own = {
        "ss_output_name": metadata.name,
        "ss_base_model_version": BASE_VERSIONS.get(metadata.family, "") + variant_suffix(metadata),
        "ss_v2": str(metadata.family == "sd2"),
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": common_or_dynamic(ranks),
        "ss_network_alpha": common_or_dynamic(alphas),
        "ss_sd_model_name": metadata.base_name,
        "ss_training_comment": metadata.description,
    }
    return {key: value for key, value in own.items() if value} | kept


def variant_suffix(metadata: AdapterMetadata) -> str:
    return "_v" if metadata.family == "sd2" and metadata.variant == "v-prediction" else ""


def common_or_dynamic(values: list[Any]) -> str:
    """The common value, or kohya's word for a file of mixed ones."""
    if not values:
        return ""
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"


def parse_foreign_metadata(entries: Mapping[str, str]) -> AdapterMetadata:
    """What another tool's header says, as far as it is known; odd values are left out rather than refused."""
    family, variant = parse_base(entries)
    triggers = entries.get("modelspec.trigger_phrase", "")
    return AdapterMetadata(
        name=entries.get("ss_output_name") or entries.get("modelspec.title") or "",
        family=family,
        variant=variant,
        base_name=none_if_literal(entries, "ss_sd_model_name"),
        base_hash=none_if_literal(entries, "ss_new_sd_model_hash"),
        trigger_words=tuple(word for part in triggers.split(",") if (word := part.strip())),
        description=entries.get("modelspec.description") or none_if_literal(entries, "ss_training_comment"),
        training={key: value for key, value in entries.items() if key.startswith("ss_")},
        created=entries.get("modelspec.date", ""),
        merged_from=tuple(part for part in entries.get("modelspec.merged_from", "").split(", ") if part),
    )


def none_if_literal(entries: Mapping[str, str], key: str) -> str:
    """A value of kohya's, who writes None as a text."""
    value = entries.get(key, "")
    return "" if value == "None" else value


def parse_base(entries: Mapping[str, str]) -> tuple[str, str]:
    """Family and variant that the header names; empty where it says nothing or something else."""
    version = entries.get("ss_base_model_version", "")
    architecture = entries.get("modelspec.architecture", "")
    family = next((name for name, base in BASE_VERSIONS.items() if version.startswith(base)), "")
    kinds = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl"}
    family = family or next((name for start, name in kinds.items() if architecture.startswith(start)), "")
    if "inpaint" in f"{version} {architecture}".lower():
        return family, "inpainting"
    velocity = version.endswith("_v") or entries.get("modelspec.prediction_type") == "v" or "768-v" in architecture
    return family, "v-prediction" if velocity else ""


def tag_frequencies(training: Mapping[str, Any]) -> dict[str, int]:
    """How often each tag stood in the captions, over all folders; empty if the record has none or a broken one."""
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
    """Our own header entry for an adapter."""
    digest = adapter_hash(adapter) if hashed else ""
    return {RECORD_KEY: Record(metadata=adapter.metadata, alpha=alpha, hash=digest).model_dump_json()}
