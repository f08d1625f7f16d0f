"""kohya's and LyCORIS' files, for SD 1.x, SD 2.x and SDXL: `lora_unet_..._to_q.lora_down.weight`.

The alpha of every module is a tensor of its own; without one, or with 0, it is the rank. Learned tokens may lie beside
the layers as `bundle_emb.<token>.string_to_param.*`.
"""

from __future__ import annotations

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


def can_read(keys: frozenset[str]) -> bool:
    """Whether any key is kohya's."""
    return any(is_kohya(key) for key in keys)


def parse_tensors(tensors: Mapping[str, Tensor], entries: Mapping[str, str], source: str) -> ParsedFile:
    """Layers by module path. Raises AdapterFormatError for a module whose tensors do not make a layer."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, leaf = split_key(key)
        if is_kohya(key):
            grouped.setdefault(name, {})[leaf] = tensor
    modules = {name: build_module(name, leaves, source) for name, leaves in grouped.items()}
    family = detect_family(modules, entries)
    table = kohya_names(family or "sd1")  # SD 1.x and SD 2.x share their names; only then is the family left open
    known = {name: module for name, module in modules.items() if name in table}
    check_unique([table[name] for name in known], source)
    tokens = read_bundled_tokens(tensors, source)
    used = {f"{name}.{leaf}" for name, module in known.items() for leaf in module.used}
    used |= {key for key in tensors if BUNDLE.match(key)}
    assumed = [name for name, module in known.items() if module.layer is not None and module.assumed_alpha]
    return ParsedFile(
        dialect=DIALECT,
        layers={table[name]: module.layer for name, module in known.items() if module.layer is not None},
        biases={table[name]: module.bias for name, module in known.items() if module.bias is not None},
        tokens=tokens,
        unmatched=tuple(key for key in tensors if key not in used),
        family=family,
        notes=(f"{len(assumed)} layers have no alpha; the rank was taken",) if assumed else (),
    )


def build_module(name: str, leaves: Mapping[str, Tensor], source: str) -> ModuleTensors:
    try:
        return layer_from_tensors(leaves)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{source}: {name}: {error}") from None


def detect_family(modules: Mapping[str, ModuleTensors], entries: Mapping[str, str]) -> str:
    """The family whose table knows the most of the names, at shapes that it can have; empty if SD 1.x or SD 2.x."""
    fitting = {family: count_matches(modules, family) for family in LAYOUTS}
    most = max(fitting.values(), default=0)
    best = tuple(family for family, count in fitting.items() if count == most and count > 0)
    return choose_family(best, parse_base(entries)[0]) or ("" if set(best) <= {"sd1", "sd2"} else best[0])


def count_matches(modules: Mapping[str, ModuleTensors], family: str) -> int:
    """How many modules a family's table knows; minus one if any of them cannot have such a shape there."""
    table = kohya_names(family)
    known = [(table[name], module.layer) for name, module in modules.items() if name in table]
    good = all(is_plausible(path, layer.weight_shape, family) for path, layer in known if layer is not None)
    return len(known) if good else -1


def check_unique(paths: list[str], source: str) -> None:
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise AdapterFormatError(f"{source}: {twice} is there twice, under two of its names; keep one of them")


def save_kohya(adapter: Adapter, path: Path) -> None:
    """Write the file that kohya's scripts, A1111, Forge and ComfyUI read, whole or not at all.

    Raises AdapterFormatError for a family that has no names there, OutputError if it cannot be written.
    """
    validate_adapter(adapter, str(path))
    tensors = kohya_tensors(adapter)
    metadata = adapter.metadata
    entries = {
        **modelspec_entries(adapter, tensors, title=metadata.name or path.stem),
        **kohya_entries(adapter),
        **record_entry(adapter, alpha={}, hashed=False),
    }
    write_safetensors(path, tensors, entries)


def kohya_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors under kohya's names."""
    family = adapter.metadata.family
    if family not in LAYOUTS:
        raise AdapterFormatError(
            f"{adapter.metadata.name or 'the adapter'}: kohya's names exist for "
            f"{', '.join(family_title(name) for name in LAYOUTS)}; this one is for "
            f"{family_title(family) or 'an unknown base'}"
        )
    tensors: dict[str, Tensor] = {}
    for path in adapter.paths:
        name = kohya_name(path, family)
        layer = adapter.layers.get(path)
        leaves = layer_to_tensors(fold_scale(layer) if layer is not None else None, adapter.biases.get(path))
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return tensors | bundle_tokens(adapter.tokens)


def fold_scale(layer: Layer) -> Layer:
    """Two whole Kronecker factors with their scale moved into the first, because LyCORIS reads no scale with them."""
    if isinstance(layer, DoRALayer) and isinstance(layer.inner, LoKrLayer):
        inner = fold_scale(layer.inner)
        assert isinstance(inner, LoKrLayer)
        return replace(layer, inner=inner)
    if not isinstance(layer, LoKrLayer) or layer.w1 is None or layer.w2 is None or layer.scale == 1:
        return layer
    return replace(layer, w1=layer.w1.float() * layer.scale, alpha=1.0)
