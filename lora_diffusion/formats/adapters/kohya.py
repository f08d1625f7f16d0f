"""Read and write kohya and LyCORIS adapter files for SD 1.x, SD 2.x and SDXL.

Keys are `<kohya module name>.<leaf>`, such as `lora_unet_..._to_q.lora_down.weight`. Each module has its own alpha
tensor; if it is missing or 0, alpha is the rank. Textual-inversion embeddings may be bundled as
`bundle_emb.<token>.string_to_param.*`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.layers import DoRALayer, Layer, LoKrLayer
from lora_diffusion.architectures.detection import choose_family, is_plausible
from lora_diffusion.architectures.families import family_title
from lora_diffusion.architectures.module_paths import LAYOUTS
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.kohya_keys import is_kohya, kohya_name, kohya_names, split_key
from lora_diffusion.formats.adapters.lycoris_tensors import ModuleTensors, layer_from_tensors, layer_to_tensors
from lora_diffusion.formats.adapters.metadata import kohya_entries, modelspec_entries, parse_base, record_entry
from lora_diffusion.formats.adapters.parsed import ParsedFile, validate_adapter
from lora_diffusion.formats.adapters.textual_inversion import BUNDLE, bundle_tokens, read_bundled_tokens
from lora_diffusion.formats.safetensors import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

DIALECT = "kohya"
"""Name of this format in `AdapterMetadata.source_format`."""


def can_read(keys: frozenset[str]) -> bool:
    """Return whether any key is in kohya's layout."""
    return any(is_kohya(key) for key in keys)


def parse_tensors(tensors: Mapping[str, Tensor], entries: Mapping[str, str], source: str) -> ParsedFile:
    """Parse the tensors of a file into layers by module path.

    Args:
        tensors: Tensors of the file, by key.
        entries: Metadata of the file, which may name the family.
        source: The path of the file, for error messages.

    Raises:
        AdapterFormatError: If the tensors of a module are incomplete or inconsistent.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, leaf = split_key(key)
        if is_kohya(key):
            grouped.setdefault(name, {})[leaf] = tensor
    modules = {name: _build_module(name, leaves, source) for name, leaves in grouped.items()}
    family = _detect_family(modules, entries)
    paths = kohya_names(family or "sd1")  # the family is empty only for SD 1.x or SD 2.x, which share their names
    known = {name: module for name, module in modules.items() if name in paths}
    _check_unique([paths[name] for name in known], source)
    tokens = read_bundled_tokens(tensors, source)
    used = {f"{name}.{leaf}" for name, module in known.items() for leaf in module.used}
    used |= {key for key in tensors if BUNDLE.match(key)}
    assumed = [name for name, module in known.items() if module.layer is not None and module.assumed_alpha]
    return ParsedFile(
        dialect=DIALECT,
        layers={paths[name]: module.layer for name, module in known.items() if module.layer is not None},
        biases={paths[name]: module.bias for name, module in known.items() if module.bias is not None},
        tokens=tokens,
        unmatched=tuple(key for key in tensors if key not in used),
        family=family,
        notes=(f"{len(assumed)} layers have no alpha; used their rank",) if assumed else (),
    )


def _build_module(name: str, leaves: Mapping[str, Tensor], source: str) -> ModuleTensors:
    try:
        return layer_from_tensors(leaves)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{source}: {name}: {error}") from None


def _detect_family(modules: Mapping[str, ModuleTensors], entries: Mapping[str, str]) -> str:
    """Return the family that matches most module names and shapes; empty if it can be SD 1.x or SD 2.x."""
    counts = {family: _count_matches(modules, family) for family in LAYOUTS}
    highest = max(counts.values(), default=0)
    best = tuple(family for family, count in counts.items() if count == highest and count > 0)
    return choose_family(best, parse_base(entries)[0]) or ("" if set(best) <= {"sd1", "sd2"} else best[0])


def _count_matches(modules: Mapping[str, ModuleTensors], family: str) -> int:
    """Return the number of modules whose name exists in a family; -1 if a shape does not fit the family."""
    paths = kohya_names(family)
    known = [(paths[name], module.layer) for name, module in modules.items() if name in paths]
    plausible = all(is_plausible(path, layer.weight_shape, family) for path, layer in known if layer is not None)
    return len(known) if plausible else -1


def _check_unique(paths: list[str], source: str) -> None:
    if len(set(paths)) < len(paths):
        duplicate = next(path for path in paths if paths.count(path) > 1)
        raise AdapterFormatError(f"{source}: has {duplicate} twice, under two kohya names; remove one of them")


def save_kohya(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Save an adapter as a file for kohya's scripts, A1111, Forge and ComfyUI. The file is written atomically.

    Raises:
        AdapterFormatError: If the adapter is empty, holds NaN or infinity, or is of a family without kohya names.
        OutputError: If the file cannot be written.
    """
    path = Path(path)
    validate_adapter(adapter, str(path))
    tensors = _kohya_tensors(adapter)
    metadata = adapter.metadata
    entries = {
        **modelspec_entries(adapter, tensors, title=metadata.name or path.stem),
        **kohya_entries(adapter),
        **record_entry(adapter, alpha={}, hashed=False),
    }
    write_safetensors(path, tensors, entries)


def _kohya_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return all tensors by kohya key."""
    family = adapter.metadata.family
    if family not in LAYOUTS:
        raise AdapterFormatError(
            f"{adapter.metadata.name or 'the adapter'}: is for {family_title(family) or 'an unknown base'}, which has "
            f"no kohya module names; expected {', '.join(family_title(name) for name in LAYOUTS)}"
        )
    tensors: dict[str, Tensor] = {}
    for path in adapter.paths:
        name = kohya_name(path, family)
        layer = adapter.layers.get(path)
        leaves = layer_to_tensors(_fold_scale(layer) if layer is not None else None, adapter.biases.get(path))
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return tensors | bundle_tokens(adapter.tokens)


def _fold_scale(layer: Layer) -> Layer:
    """Multiply the scale of a LoKr layer with two full factors into the first, because LyCORIS ignores alpha there."""
    if isinstance(layer, DoRALayer) and isinstance(layer.inner, LoKrLayer):
        inner = _fold_scale(layer.inner)
        assert isinstance(inner, LoKrLayer)
        return replace(layer, inner=inner)
    if not isinstance(layer, LoKrLayer) or layer.w1 is None or layer.w2 is None or layer.scale == 1:
        return layer
    return replace(layer, w1=layer.w1.float() * layer.scale, alpha=1.0)
