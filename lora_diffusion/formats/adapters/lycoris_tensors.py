"""Convert between layers and the tensors of one module in kohya and LyCORIS files.

A leaf is the part of a key after the module name: `lora_up.weight`, `hada_w1_a`, `dora_scale`, `alpha`. PEFT's LoHa and
LoKr use the same leaves [github.com/KohakuBlueleaf/LyCORIS, lycoris/modules].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_diffusion.adapters.layers import (
    DoRALayer,
    FullLayer,
    Layer,
    LoHaLayer,
    LoKrLayer,
    LoRALayer,
    LowRank,
    with_alpha,
)
from lora_diffusion.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor

_LOW_RANK: Mapping[type[LowRank], Mapping[str, str]] = {
    LoRALayer: {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"},
    LoHaLayer: {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    LoKrLayer: {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""Leaf of each factor, by layer class."""
_NEEDED: Mapping[type[LowRank], tuple[str, ...]] = {
    LoRALayer: ("down", "up"),
    LoHaLayer: ("w1_a", "w1_b", "w2_a", "w2_b"),
    LoKrLayer: (),
}
ALPHA = "alpha"
"""Leaf of alpha."""
MAGNITUDE = "dora_scale"
"""Leaf of the DoRA magnitude."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTensors:
    """The content of one module in a file."""

    layer: Layer | None = None
    bias: Tensor | None = field(default=None, repr=False)
    used: frozenset[str] = frozenset()
    """The leaves that were used; other leaves of the module are not recognized."""
    assumed_alpha: bool = False
    """Whether the file has no alpha for the module, so that the rank is used."""


def layer_from_tensors(leaves: Mapping[str, Tensor]) -> ModuleTensors:
    """Make a layer from the tensors of a module.

    Args:
        leaves: Tensors of the module, by leaf.

    Raises:
        AdapterFormatError: If factors are missing or inconsistent.
    """
    bias_name = next((name for name in ("diff_b", "b_norm") if name in leaves), None)
    bias = leaves[bias_name] if bias_name else None
    if bias is not None and (bias.ndim != 1 or not bias.is_floating_point()):
        raise AdapterFormatError(
            f"{bias_name} has shape {tuple(bias.shape)} and dtype {bias.dtype}; expected floating point of shape (out,)"
        )
    used = {bias_name} if bias_name else set[str]()
    for name in ("diff", "w_norm"):
        if name in leaves:
            return ModuleTensors(layer=FullLayer(diff=leaves[name]), bias=bias, used=frozenset({*used, name}))
    kind = next((kind for kind in _LOW_RANK if any(leaf in leaves for leaf in _LOW_RANK[kind].values())), None)
    if kind is None:
        return ModuleTensors(bias=bias, used=frozenset(used))
    inner = _build_low_rank_layer(kind, leaves)
    used |= set(_LOW_RANK[kind].values()) | {ALPHA, MAGNITUDE}
    layer = DoRALayer(inner=inner, magnitude=leaves[MAGNITUDE]) if MAGNITUDE in leaves else inner
    return ModuleTensors(layer=layer, bias=bias, used=frozenset(used & set(leaves)), assumed_alpha=ALPHA not in leaves)


def _build_low_rank_layer(kind: type[LowRank], leaves: Mapping[str, Tensor]) -> LowRank:
    """Make a LoRA, LoHa or LoKr layer, with alpha as kohya and LyCORIS interpret it."""
    factors = {field: leaves[leaf] for field, leaf in _LOW_RANK[kind].items() if leaf in leaves}
    missing = [field for field in _NEEDED[kind] if field not in factors]
    if missing:
        raise AdapterFormatError(
            f"has only some of its {len(_NEEDED[kind])} factors (missing: {', '.join(missing)}); the file is incomplete"
        )
    layer = kind(**factors, alpha=1.0)
    if isinstance(layer, LoKrLayer) and layer.w1 is not None and layer.w2 is not None:
        return layer  # LyCORIS ignores alpha if both factors are full matrices
    return with_alpha(layer, _resolve_alpha(leaves.get(ALPHA), layer.rank))


def _resolve_alpha(alpha: Tensor | None, rank: int) -> float:
    """Return alpha by kohya's rule: a missing alpha, or an alpha of 0, means the rank."""
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1:
        raise AdapterFormatError(f"alpha has shape {tuple(alpha.shape)}; expected one number")
    return float(alpha) or float(rank)


def layer_to_tensors(layer: Layer | None, bias: Tensor | None) -> dict[str, Tensor]:
    """Convert a layer and a bias to tensors by leaf.

    `layer_from_tensors` restores the layer, except the alpha of a LoKr layer with two full factors, which must have
    scale 1.
    """
    leaves: dict[str, Tensor] = {}
    norm = isinstance(layer, FullLayer) and layer.diff.ndim == 1
    if bias is not None:
        leaves["b_norm" if norm else "diff_b"] = bias
    if isinstance(layer, FullLayer):
        return {**leaves, "w_norm" if norm else "diff": layer.diff}
    if isinstance(layer, DoRALayer):
        leaves[MAGNITUDE] = layer.magnitude
        layer = layer.inner
    if layer is None:
        return leaves
    assert isinstance(layer, LowRank)
    leaves |= {_LOW_RANK[type(layer)][field]: factor for field, factor in layer.factors.items()}
    return {**leaves, ALPHA: _alpha_tensor(layer.alpha)}


def _alpha_tensor(alpha: float) -> Tensor:
    """Return alpha as float32 if that is exact, else as float64, which the square roots in rsLoRA need."""
    import torch

    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)
