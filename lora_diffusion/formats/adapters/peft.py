"""PEFT's and diffusers' key layout, today's and the older spellings, into layers by module path.

    unet.<module>.lora_A.weight                            PEFT, as diffusers writes it now
    base_model.model.<module>.lora_A.weight                PEFT's own folders; the component is told by the module
    unet.<module>.lora.down.weight                         diffusers 0.22
    unet.<attention>.processor.to_q_lora.down.weight       diffusers until 0.21
    text_encoder.<module>.lora_linear_layer.down.weight    diffusers until 0.21

LoHa and LoKr have LyCORIS' names for their factors. The alpha is in the header, in `adapter_config.json`, in a tensor,
or nowhere, which means the rank [github.com/huggingface/peft; diffusers/utils/state_dict_utils.py].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_diffusion.adapters.layers import DoRALayer, Layer, LoKrLayer, LoRALayer, LowRank, with_alpha
from lora_diffusion.architectures.families import COMPONENTS
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.lycoris_tensors import MAGNITUDE, ModuleTensors, layer_from_tensors
from lora_diffusion.formats.adapters.parsed import ParsedFile

if TYPE_CHECKING:
    from torch import Tensor

DIALECT, OLDER = "peft", "diffusers (older spelling)"
PEFT_KEY = "lora_adapter_metadata"
MAGNITUDE_VECTOR = "lora_magnitude_vector"
ADAPTER_NAME = r"(?:\.[A-Za-z0-9_]+)?"
LEAVES: tuple[tuple[str, str, str], ...] = (
    (rf"\.lora_A{ADAPTER_NAME}\.weight", "lora_down.weight", DIALECT),
    (rf"\.lora_B{ADAPTER_NAME}\.weight", "lora_up.weight", DIALECT),
    (rf"\.lora_B{ADAPTER_NAME}\.bias", "lora_up.bias", DIALECT),
    (r"\.lora_magnitude_vector(?:\.\w+){0,2}", MAGNITUDE_VECTOR, DIALECT),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))", r"\1", DIALECT),
    (r"\.(lora_(?:down|up|mid)\.weight|dora_scale|diff|diff_b|w_norm|b_norm|alpha)", r"\1", DIALECT),
    (r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight", r"lora_\1.weight", OLDER),
    (r"(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight", r"lora_\2.weight", OLDER),
)
"""How a key ends, the leaf that this is, and the dialect that it speaks of; the rest of the key is the module."""
OLD_PROJECTION = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.")
UNET_STARTS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_", "time_embedding.", "add_embedding.")
TEXT_STARTS = ("text_model.", "encoder.layers.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedKey:
    """Where a key belongs: component (empty if the key leaves it open), module in it, and leaf."""

    component: str
    module: str
    leaf: str
    dialect: str


@lru_cache(maxsize=2**16)
def parse_key(key: str) -> ParsedKey | None:
    """Read one key; None if it is in none of the spellings. The same keys come with every adapter."""
    for ending, leaf, dialect in LEAVES:
        match = re.search(f"{ending}$", key)
        if match is None or match.start() == 0:
            continue
        module = key[: match.start()].removeprefix("base_model.model.")
        component, _, rest = module.partition(".")
        if component in COMPONENTS and rest:
            module = rest
        elif module.startswith(UNET_STARTS):
            component = "unet"
        elif module.startswith(TEXT_STARTS):
            component = ""
        else:
            return None
        module += legacy_projection(key, component)
        return ParsedKey(component=component, module=module, leaf=match.expand(leaf), dialect=dialect)
    return None


def legacy_projection(key: str, component: str) -> str:
    """The projection that an old attention processor's key names: `.to_q`, or `.q_proj` of a text encoder."""
    match = OLD_PROJECTION.search(key)
    if match is None:
        return ""
    if component == "unet":
        return f".to_{match[1]}" + (".0" if match[1] == "out" else "")
    return f".{match[1]}_proj"


def can_read(keys: frozenset[str]) -> bool:
    """Whether any key is in one of the spellings."""
    return any(parse_key(key) for key in keys)


def parse_tensors(
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    source: str,
    *,
    config: Mapping[str, Any] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> ParsedFile:
    """Layers by module path.

    `config` is a PEFT folder's `adapter_config.json`; `alphas` by module path, where given, win over everything else.
    Raises AdapterFormatError for a module whose tensors do not make a layer, or a configuration that cannot be applied.
    """
    places = {key: place for key in tensors if (place := parse_key(key))}
    only = infer_text_component(tensors, places)
    grouped: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, place in places.items():
        path = canonical_path(f"{place.component or only}.{place.module}")
        leaves = grouped.setdefault(path, {})
        if place.leaf in leaves:
            raise AdapterFormatError(f"{source}: {path} is there twice ({leaves[place.leaf][0]} and {key}); keep one")
        leaves[place.leaf] = (key, tensors[key])
    peft = peft_settings(entries, config, source)
    reader = ModuleReader(source=source, peft=peft, alphas=alphas)
    modules = {
        path: reader.read_module(path, {leaf: t for leaf, (_, t) in leaves.items()}) for path, leaves in grouped.items()
    }
    used = {leaves[leaf][0] for path, leaves in grouped.items() for leaf in modules[path].used}
    assumed = sum(module.assumed_alpha and module.layer is not None for module in modules.values())
    dialects = {place.dialect for place in places.values()}
    return ParsedFile(
        dialect=DIALECT if dialects <= {DIALECT} else OLDER,
        layers={path: module.layer for path, module in modules.items() if module.layer is not None},
        biases={path: module.bias for path, module in modules.items() if module.bias is not None},
        unmatched=tuple(key for key in tensors if key not in used),
        notes=(f"{assumed} layers have no alpha; the rank was taken",) if assumed else (),
    )


def infer_text_component(tensors: Mapping[str, Tensor], places: Mapping[str, ParsedKey]) -> str:
    """The text encoder that keys without a component are for, by the width of its factors: 1280 is SDXL's second."""
    widths = {
        tensors[key].shape[-1]
        for key, place in places.items()
        if not place.component and place.leaf == "lora_down.weight" and "fc2" not in place.module
    }
    return "text_encoder_2" if widths == {1280} else "text_encoder"


def canonical_path(module: str) -> str:
    """Our spelling of a module: transformers from 5.6 on drops the level `text_model` of CLIPTextModel."""
    return re.sub(r"^(text_encoder(?:_2)?)\.(encoder|final_layer_norm)\b", r"\1.text_model.\2", module)


def peft_settings(entries: Mapping[str, str], config: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """PEFT's settings with the component before each, as diffusers' header has them; a folder's have none."""
    try:
        settings = json.loads(entries.get(PEFT_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{source}: header entry {PEFT_KEY!r} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise AdapterFormatError(f"{source}: header entry {PEFT_KEY!r} is no table of settings")
    settings = {**(config or {}), **settings}
    return {key if key.partition(".")[0] in COMPONENTS else f".{key}": value for key, value in settings.items()}


@dataclass(frozen=True, kw_only=True)
class ModuleReader:
    """Makes layers of modules under one file's settings."""

    source: str
    peft: Mapping[str, Any]
    alphas: Mapping[str, float] | None

    def read_module(self, path: str, leaves: Mapping[str, Tensor]) -> ModuleTensors:
        """One module. Raises AdapterFormatError that names it."""
        try:
            return self.read_layer(path, leaves)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{self.source}: {path}: {error}") from None
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise AdapterFormatError(f"{self.source}: header entry {PEFT_KEY!r} cannot be applied ({error})") from None

    def read_layer(self, path: str, leaves: Mapping[str, Tensor]) -> ModuleTensors:
        plain = {leaf: tensor for leaf, tensor in leaves.items() if leaf not in ("lora_up.bias", MAGNITUDE_VECTOR)}
        if MAGNITUDE_VECTOR in leaves:
            plain[MAGNITUDE] = reshape_magnitude(leaves[MAGNITUDE_VECTOR], leaves.get("lora_down.weight"))
        found = layer_from_tensors(plain)
        if MAGNITUDE_VECTOR in leaves:
            found = replace(found, used=found.used - {MAGNITUDE} | {MAGNITUDE_VECTOR})
        layer = found.layer
        low_rank = layer.inner if isinstance(layer, DoRALayer) else layer
        if not isinstance(low_rank, LowRank):
            return found
        if isinstance(layer, LoRALayer) and self.get_setting(path, "use_dora"):
            raise AdapterFormatError("the header says DoRA, but the file has no magnitude for it; it is incomplete")
        alpha = self.resolve_alpha(path, low_rank)
        if alpha is None:
            return self.with_bias(found, leaves, low_rank)
        scaled = with_alpha(low_rank, alpha)
        outer = replace(layer, inner=scaled) if isinstance(layer, DoRALayer) else scaled
        return self.with_bias(replace(found, layer=outer, assumed_alpha=False), leaves, scaled)

    def with_bias(self, found: ModuleTensors, leaves: Mapping[str, Tensor], layer: Layer) -> ModuleTensors:
        """PEFT scales a bias of `up` like the layer itself."""
        bias = leaves.get("lora_up.bias")
        if bias is None or not isinstance(layer, LoRALayer):
            return found
        return replace(found, bias=bias.float() * layer.scale, used=found.used | {"lora_up.bias"})

    def resolve_alpha(self, path: str, layer: Any) -> float | None:
        """Our own record's, else by PEFT's rules: patterns first, then the common value; None if nothing says."""
        if self.alphas is not None:
            if path not in self.alphas:
                raise AdapterFormatError("the header has no alpha for it; the file is damaged")
            return self.alphas[path]
        name = next((name for name in ("lora_alpha", "alpha") if self.has_setting(path, name)), None)
        if name is None and not self.has_setting(path, "alpha_pattern"):
            return None
        common = self.get_setting(path, name) if name else layer.rank
        alpha = float(self.match_pattern(path, "alpha_pattern", common))
        if isinstance(layer, LoKrLayer) and layer.w1 is not None and layer.w2 is not None:
            return alpha / float(self.match_pattern(path, "rank_pattern", self.get_setting(path, "r", 1)))
        return alpha * math.sqrt(layer.rank) if self.get_setting(path, "use_rslora") else alpha

    def has_setting(self, path: str, name: str) -> bool:
        return f"{path.split('.', 1)[0]}.{name}" in self.peft or f".{name}" in self.peft

    def get_setting(self, path: str, name: str, default: Any = None) -> Any:
        component = path.split(".", 1)[0]
        return self.peft.get(f"{component}.{name}", self.peft.get(f".{name}", default))

    def match_pattern(self, path: str, name: str, common: Any) -> Any:
        inner = path.split(".", 1)[1]
        spellings = (inner, inner.removeprefix("text_model."))
        for pattern, value in (self.get_setting(path, name) or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", spelling) for spelling in spellings):
                return value
        return common


def reshape_magnitude(values: Tensor, down: Tensor | None) -> Tensor:
    """PEFT's magnitudes, (out,) or (1, out, 1, 1), as (out, 1[, 1, 1])."""
    return values.reshape(-1, *[1] * (1 if down is None else down.ndim - 1))
