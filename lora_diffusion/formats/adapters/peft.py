"""Read adapters of PEFT and diffusers, in the current and in older key layouts.

    unet.<module>.lora_A.weight                            PEFT, as diffusers writes it now
    base_model.model.<module>.lora_A.weight                PEFT folders; without component
    unet.<module>.lora.down.weight                         diffusers 0.22
    unet.<attention>.processor.to_q_lora.down.weight       diffusers until 0.21
    text_encoder.<module>.lora_linear_layer.down.weight    diffusers until 0.21

LoHa and LoKr use LyCORIS' names for their factors. Alpha is in the metadata, in `adapter_config.json` or in a tensor;
without alpha, it is the rank [github.com/huggingface/peft; diffusers/utils/state_dict_utils.py].
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
from lora_diffusion.formats.json_values import is_object

if TYPE_CHECKING:
    from torch import Tensor

DIALECT = "peft"
"""Name of the current format in `AdapterMetadata.source_format`."""
_OLDER = "diffusers (older spelling)"
PEFT_KEY = "lora_adapter_metadata"
"""Metadata key of the PEFT configuration, which diffusers and PEFT read."""
MAGNITUDE_VECTOR = "lora_magnitude_vector"
"""Leaf of the DoRA magnitude in PEFT files."""
_ADAPTER_NAME = r"(?:\.[A-Za-z0-9_]+)?"
_LEAVES: tuple[tuple[str, str, str], ...] = (
    (rf"\.lora_A{_ADAPTER_NAME}\.weight", "lora_down.weight", DIALECT),
    (rf"\.lora_B{_ADAPTER_NAME}\.weight", "lora_up.weight", DIALECT),
    (rf"\.lora_B{_ADAPTER_NAME}\.bias", "lora_up.bias", DIALECT),
    (r"\.lora_magnitude_vector(?:\.\w+){0,2}", MAGNITUDE_VECTOR, DIALECT),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))", r"\1", DIALECT),
    (r"\.(lora_(?:down|up|mid)\.weight|dora_scale|diff|diff_b|w_norm|b_norm|alpha)", r"\1", DIALECT),
    (r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight", r"lora_\1.weight", _OLDER),
    (r"(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight", r"lora_\2.weight", _OLDER),
)
"""Pattern of the end of a key, its kohya or LyCORIS leaf, and the format it belongs to."""
_OLD_PROJECTION = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora\.")
_UNET_STARTS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_", "time_embedding.", "add_embedding.")
_TEXT_STARTS = ("text_model.", "encoder.layers.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _ParsedKey:
    """A key split into component, module and leaf."""

    component: str
    """Empty if the key does not name the text encoder."""
    module: str
    leaf: str
    dialect: str


@lru_cache(maxsize=2**16)
def _parse_key(key: str) -> _ParsedKey | None:
    """Split a key; None if it is in no known layout. Cached, because all adapters share the same keys."""
    for ending, leaf, dialect in _LEAVES:
        match = re.search(f"{ending}$", key)
        if match is None or match.start() == 0:
            continue
        module = key[: match.start()].removeprefix("base_model.model.")
        component, _, rest = module.partition(".")
        if component in COMPONENTS and rest:
            module = rest
        elif module.startswith(_UNET_STARTS):
            component = "unet"
        elif module.startswith(_TEXT_STARTS):
            component = ""
        else:
            return None
        module += _legacy_projection(key, component)
        return _ParsedKey(component=component, module=module, leaf=match.expand(leaf), dialect=dialect)
    return None


def _legacy_projection(key: str, component: str) -> str:
    """Return the projection in an old attention-processor key: `.to_q`, or `.q_proj` for a text encoder."""
    match = _OLD_PROJECTION.search(key)
    if match is None:
        return ""
    if component == "unet":
        return f".to_{match[1]}" + (".0" if match[1] == "out" else "")
    return f".{match[1]}_proj"


def can_read(keys: frozenset[str]) -> bool:
    """Return whether any key is in a PEFT or diffusers layout."""
    return any(_parse_key(key) for key in keys)


def parse_tensors(
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    source: str,
    *,
    config: Mapping[str, Any] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> ParsedFile:
    """Parse the tensors of a file into layers by module path.

    Args:
        tensors: Tensors of the file, by key.
        entries: Metadata of the file.
        source: The path of the file, for error messages.
        config: The `adapter_config.json` of a PEFT folder.
        alphas: Alpha by module path, from the record of a native file; takes precedence over other sources of alpha.

    Raises:
        AdapterFormatError: If the tensors of a module are incomplete or inconsistent, or the PEFT configuration is
            invalid.
    """
    parsed_keys = {key: parsed for key in tensors if (parsed := _parse_key(key))}
    text_component = _infer_text_component(tensors, parsed_keys)
    grouped: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, parsed in parsed_keys.items():
        path = _canonical_path(f"{parsed.component or text_component}.{parsed.module}")
        leaves = grouped.setdefault(path, {})
        if parsed.leaf in leaves:
            first = leaves[parsed.leaf][0]
            raise AdapterFormatError(f"{source}: has {path} twice ({first} and {key}); remove one of them")
        leaves[parsed.leaf] = (key, tensors[key])
    peft = _peft_settings(entries, config, source)
    reader = _ModuleReader(source=source, peft=peft, alphas=alphas)
    modules = {
        path: reader.read_module(path, {leaf: t for leaf, (_, t) in leaves.items()}) for path, leaves in grouped.items()
    }
    used = {leaves[leaf][0] for path, leaves in grouped.items() for leaf in modules[path].used}
    assumed = sum(module.assumed_alpha and module.layer is not None for module in modules.values())
    dialects = {parsed.dialect for parsed in parsed_keys.values()}
    return ParsedFile(
        dialect=DIALECT if dialects <= {DIALECT} else _OLDER,
        layers={path: module.layer for path, module in modules.items() if module.layer is not None},
        biases={path: module.bias for path, module in modules.items() if module.bias is not None},
        unmatched=tuple(key for key in tensors if key not in used),
        notes=(f"{assumed} layers have no alpha; used their rank",) if assumed else (),
    )


def _infer_text_component(tensors: Mapping[str, Tensor], parsed_keys: Mapping[str, _ParsedKey]) -> str:
    """Return the text encoder of keys without a component, by its width: 1280 is the second one of SDXL."""
    widths = {
        tensors[key].shape[-1]
        for key, parsed in parsed_keys.items()
        if not parsed.component and parsed.leaf == "lora_down.weight" and "fc2" not in parsed.module
    }
    return "text_encoder_2" if widths == {1280} else "text_encoder"


def _canonical_path(module: str) -> str:
    """Insert `text_model`, which transformers dropped from CLIPTextModel in 5.6, into a module path."""
    return re.sub(r"^(text_encoder(?:_2)?)\.(encoder|final_layer_norm)\b", r"\1.text_model.\2", module)


def _peft_settings(entries: Mapping[str, str], config: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """Return the PEFT configuration by `<component>.<name>`, or by `.<name>` in PEFT folders."""
    try:
        settings = json.loads(entries.get(PEFT_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{source}: metadata entry {PEFT_KEY!r} is not valid JSON ({error})") from None
    if not is_object(settings):
        raise AdapterFormatError(
            f"{source}: metadata entry {PEFT_KEY!r} is not a JSON object; expected a PEFT configuration"
        )
    merged = {**(config or {}), **settings}
    return {key if key.partition(".")[0] in COMPONENTS else f".{key}": value for key, value in merged.items()}


@dataclass(frozen=True, kw_only=True)
class _ModuleReader:
    """Makes layers from the tensors of modules, with the PEFT configuration of their file."""

    source: str
    peft: Mapping[str, Any]
    alphas: Mapping[str, float] | None

    def read_module(self, path: str, leaves: Mapping[str, Tensor]) -> ModuleTensors:
        """Read one module. Raises AdapterFormatError that names it."""
        try:
            return self._read_layer(path, leaves)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{self.source}: {path}: {error}") from None
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise AdapterFormatError(
                f"{self.source}: the PEFT configuration cannot be applied to {path} ({error})"
            ) from None

    def _read_layer(self, path: str, leaves: Mapping[str, Tensor]) -> ModuleTensors:
        plain = {leaf: tensor for leaf, tensor in leaves.items() if leaf not in ("lora_up.bias", MAGNITUDE_VECTOR)}
        if MAGNITUDE_VECTOR in leaves:
            plain[MAGNITUDE] = _reshape_magnitude(leaves[MAGNITUDE_VECTOR], leaves.get("lora_down.weight"))
        module = layer_from_tensors(plain)
        if MAGNITUDE_VECTOR in leaves:
            module = replace(module, used=module.used - {MAGNITUDE} | {MAGNITUDE_VECTOR})
        layer = module.layer
        low_rank = layer.inner if isinstance(layer, DoRALayer) else layer
        if not isinstance(low_rank, LowRank):
            return module
        if isinstance(layer, LoRALayer) and self._get_setting(path, "use_dora"):
            raise AdapterFormatError(
                "the PEFT configuration has use_dora, but the magnitude is missing; the file is incomplete"
            )
        alpha = self._resolve_alpha(path, low_rank)
        if alpha is None:
            return self._with_bias(module, leaves, low_rank)
        scaled = with_alpha(low_rank, alpha)
        outer = replace(layer, inner=scaled) if isinstance(layer, DoRALayer) else scaled
        return self._with_bias(replace(module, layer=outer, assumed_alpha=False), leaves, scaled)

    def _with_bias(self, module: ModuleTensors, leaves: Mapping[str, Tensor], layer: Layer) -> ModuleTensors:
        """Add the bias of `up`, which PEFT multiplies by the scale of the layer."""
        bias = leaves.get("lora_up.bias")
        if bias is None or not isinstance(layer, LoRALayer):
            return module
        return replace(module, bias=bias.float() * layer.scale, used=module.used | {"lora_up.bias"})

    def _resolve_alpha(self, path: str, layer: Any) -> float | None:
        """Return alpha from the record, else from the PEFT configuration (patterns first); None if neither has it."""
        if self.alphas is not None:
            if path not in self.alphas:
                raise AdapterFormatError("has no alpha in the metadata; the file is damaged")
            return self.alphas[path]
        name = next((name for name in ("lora_alpha", "alpha") if self._has_setting(path, name)), None)
        if name is None and not self._has_setting(path, "alpha_pattern"):
            return None
        default = self._get_setting(path, name) if name else layer.rank
        alpha = float(self._match_pattern(path, "alpha_pattern", default))
        if isinstance(layer, LoKrLayer) and layer.w1 is not None and layer.w2 is not None:
            return alpha / float(self._match_pattern(path, "rank_pattern", self._get_setting(path, "r", 1)))
        return alpha * math.sqrt(layer.rank) if self._get_setting(path, "use_rslora") else alpha

    def _has_setting(self, path: str, name: str) -> bool:
        return f"{path.split('.', 1)[0]}.{name}" in self.peft or f".{name}" in self.peft

    def _get_setting(self, path: str, name: str, default: Any = None) -> Any:
        component = path.split(".", 1)[0]
        return self.peft.get(f"{component}.{name}", self.peft.get(f".{name}", default))

    def _match_pattern(self, path: str, name: str, default: Any) -> Any:
        """Return the value of the first pattern that matches a module, as in PEFT."""
        inner = path.split(".", 1)[1]
        spellings = (inner, inner.removeprefix("text_model."))
        patterns: Mapping[str, Any] = self._get_setting(path, name) or {}
        for pattern, value in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", spelling) for spelling in spellings):
                return value
        return default


def _reshape_magnitude(values: Tensor, down: Tensor | None) -> Tensor:
    """Reshape PEFT's magnitudes, (out,) or (1, out, 1, 1), to (out, 1[, 1, 1])."""
    return values.reshape(-1, *[1] * (1 if down is None else down.ndim - 1))
