"""The native file: PEFT's key layout as diffusers reads it, everything else in the header.

Keys are `<module path>.lora_A.weight` (down) and `.lora_B.weight` (up). diffusers refuses a file with any further
tensor, so the alpha of each layer is in the header instead: as `lora_adapter_metadata`, which diffusers and PEFT apply,
and once more by module path in our own record. ModelSpec keys [github.com/Stability-AI/ModelSpec] tell other programs
what the file is.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from lora_diffusion.adapter import Adapter, AdapterMetadata, LoRALayer, adapter_hash, non_finite_paths
from lora_diffusion.config import Settings, describe
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.families import COMPONENTS, FAMILIES
from lora_diffusion.formats.safetensors_file import payload_hash, read_safetensors, write_safetensors

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
RECORD_KEY = "lora_diffusion"
PEFT_KEY = "lora_adapter_metadata"


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write the native file, whole or not at all.

    Raises AdapterFormatError for an adapter without layers or with NaN in them, OutputError if it cannot be written.
    """
    refuse_unusable(adapter, str(path))
    tensors = {path + UP: layer.up for path, layer in adapter.layers.items()}
    tensors |= {path + DOWN: layer.down for path, layer in adapter.layers.items()}
    write_safetensors(path, tensors, header(adapter, tensors, title=adapter.metadata.name or path.stem))


def refuse_unusable(adapter: Adapter, source: str) -> None:
    if not adapter.layers:
        raise AdapterFormatError(f"{source}: an adapter without layers; expected at least one pair of factors")
    broken = non_finite_paths(adapter)
    if broken:
        raise AdapterFormatError(
            f"{source}: {len(broken)} of {len(adapter.layers)} layers hold NaN or infinity (first: {broken[0]}); "
            "the training that made it broke down, use an earlier file"
        )


def header(adapter: Adapter, tensors: Mapping[str, Tensor], *, title: str) -> dict[str, str]:
    """All header entries, as strings."""
    metadata = adapter.metadata
    alpha = {path: float(layer.alpha) for path, layer in adapter.layers.items()}
    record = Record(metadata=metadata, alpha=alpha, hash=adapter_hash(adapter))
    entries = {
        RECORD_KEY: record.model_dump_json(),
        PEFT_KEY: json.dumps(peft_metadata(adapter), sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.hash_sha256": f"0x{payload_hash(tensors)}",
    }
    family = FAMILIES.get(metadata.family)
    if family:
        entries["modelspec.architecture"] = family.modelspec
        entries["modelspec.resolution"] = f"{family.resolution}x{family.resolution}"
    if metadata.trigger_words:
        entries["modelspec.trigger_phrase"] = ", ".join(metadata.trigger_words)
    if metadata.description:
        entries["modelspec.description"] = metadata.description
    if metadata.created:
        entries["modelspec.date"] = metadata.created
    return entries


def peft_metadata(adapter: Adapter) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that carry rank and alpha, per component, as diffusers wants them."""
    entries: dict[str, Any] = {}
    for component in adapter.components:
        layers = {
            path.removeprefix(f"{component}."): layer
            for path, layer in adapter.layers.items()
            if path.startswith(f"{component}.")
        }
        ranks = {path: layer.rank for path, layer in layers.items()}
        alphas = {path: float(layer.alpha) for path, layer in layers.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": "|".join(either_spelling(p) for p in sorted(layers)),
            "rank_pattern": {f"^{either_spelling(p)}": r for p, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{either_spelling(p)}": a for p, a in alphas.items() if a != alpha},
        }
        entries |= {f"{component}.{key}": value for key, value in config.items()}
    return entries


def either_spelling(path: str) -> str:
    """A regular expression for a module with or without the level `text_model` (see `canonical_path`)."""
    inner = path.removeprefix("text_model.")
    return re.escape(path) if inner == path else rf"(text_model\.)?{re.escape(inner)}"


def load_adapter(path: Path) -> Adapter:
    """Read a file in PEFT's key layout, ours or another tool's.

    Raises AdapterFormatError if any tensor of the file is not understood.
    """
    tensors, entries = read_safetensors(path)
    pairs = factor_pairs(tensors, str(path))
    record = read_record(entries, str(path))
    peft = {} if record else read_peft(entries, str(path))
    layers: dict[str, LoRALayer] = {}
    for module, (down, up) in pairs.items():
        try:
            alpha = record.alpha[module] if record else peft_alpha(peft, module, down.shape[0] if down.ndim else 0)
            layers[module] = LoRALayer(down=down, up=up, alpha=alpha)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{path}: {module}: {error}") from None
        except KeyError:
            raise AdapterFormatError(f"{path}: {module}: the header has no alpha for it; the file is damaged") from None
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise AdapterFormatError(f"{path}: header entry {PEFT_KEY!r} cannot be applied ({error})") from None
    metadata = record.metadata if record else AdapterMetadata(source_format="peft")
    if not metadata.name:
        metadata = metadata.model_copy(update={"name": path.stem})
    adapter = Adapter(layers=layers, metadata=metadata)
    refuse_unusable(adapter, str(path))
    if record and record.hash != adapter_hash(adapter):
        raise AdapterFormatError(f"{path}: its tensors are not those it was saved with; the file is damaged or edited")
    return adapter


def factor_pairs(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by module path; every tensor must be one half of a pair."""
    unknown = [key for key in tensors if not is_factor(key)]
    if unknown or not tensors:
        example = f"first: {unknown[0]!r}" if unknown else "it holds no tensors"
        raise AdapterFormatError(
            f"{source}: {len(unknown)} of {len(tensors)} tensors are not in PEFT's layout ({example}); expected "
            f"'<component>.<module>{DOWN}' and '{UP}' with a component of {', '.join(COMPONENTS)}"
        )
    halves = {key.removesuffix(DOWN).removesuffix(UP) for key in tensors}
    twice = sorted(m for m in halves if canonical_path(m) != m and canonical_path(m) in halves)
    if twice:
        raise AdapterFormatError(f"{source}: {twice[0]} is there twice, with and without the level `text_model`")
    single = sorted(m for m in halves if m + DOWN not in tensors or m + UP not in tensors)
    if single:
        raise AdapterFormatError(f"{source}: {single[0]} has only one of its two factors; the file is incomplete")
    return {canonical_path(m): (tensors[m + DOWN], tensors[m + UP]) for m in sorted(halves)}


def is_factor(key: str) -> bool:
    component, _, module = key.removesuffix(DOWN).removesuffix(UP).partition(".")
    return key.endswith((DOWN, UP)) and component in COMPONENTS and module != ""


def canonical_path(module: str) -> str:
    """Our spelling of a module: transformers from 5.6 on drops the level `text_model` of CLIPTextModel."""
    return re.sub(r"^(text_encoder(?:_2)?)\.encoder\.", r"\1.text_model.encoder.", module)


class Record(Settings):
    """Our own header entry."""

    metadata: AdapterMetadata
    alpha: Mapping[str, float]
    """By module path."""
    hash: str


def read_record(entries: Mapping[str, str], source: str) -> Record | None:
    """Our own header entry; None for other tools' files. Raises AdapterFormatError if it cannot be read."""
    if RECORD_KEY not in entries:
        return None
    try:
        return Record.model_validate_json(entries[RECORD_KEY])
    except ValidationError as error:
        raise AdapterFormatError(
            f"{source}: header entry {RECORD_KEY!r} cannot be read ({describe(error, Record)}); "
            "written by a newer version?"
        ) from None


def read_peft(entries: Mapping[str, str], source: str) -> dict[str, Any]:
    try:
        peft = json.loads(entries.get(PEFT_KEY, "{}"))
    except ValueError as error:
        raise AdapterFormatError(f"{source}: header entry {PEFT_KEY!r} is not JSON ({error})") from None
    if not isinstance(peft, dict):
        raise AdapterFormatError(f"{source}: header entry {PEFT_KEY!r} is no table of settings")
    if any(value for key, value in peft.items() if key.endswith(".use_dora")):
        raise AdapterFormatError(f"{source}: is a DoRA adapter; this version reads plain LoRA")
    return peft


def peft_alpha(peft: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha by PEFT's rules: patterns first, then the common value, else the layer's own rank (scale 1)."""
    component, path = module.split(".", 1)
    short = path.removeprefix("text_model.")
    alpha = peft.get(f"{component}.lora_alpha", rank)
    for pattern, value in (peft.get(f"{component}.alpha_pattern") or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (path, short)):
            alpha = value
            break
    if peft.get(f"{component}.use_rslora"):
        return float(alpha) * math.sqrt(rank)
    return float(alpha)
