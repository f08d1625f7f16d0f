"""The tensors of one module, as kohya's and LyCORIS' trainers name them, into a layer and back.

A leaf is the last part of a key: `lora_up.weight`, `hada_w1_a`, `dora_scale`, `alpha`. PEFT's LoHa and LoKr use the
same names [github.com/KohakuBlueleaf/LyCORIS, lycoris/modules].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

LOW_RANK: Mapping[type[LowRank], Mapping[str, str]] = {
    LoRALayer: {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"},
    LoHaLayer: {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    LoKrLayer: {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""The leaf of each factor, by kind of layer."""
NEEDED: Mapping[type[LowRank], tuple[str, ...]] = {
    LoRALayer: ("down", "up"),
    LoHaLayer: ("w1_a", "w1_b", "w2_a", "w2_b"),
    LoKrLayer: (),
}
ALPHA, MAGNITUDE = "alpha", "dora_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTensors:
    """What a file holds for one module."""

    layer: Layer | None = None
    bias: Tensor | None = None
    used: frozenset[str] = frozenset()
    """The leaves that went into it; any other is not understood."""
    assumed_alpha: bool = False
    """Whether the file has no alpha for it, so that the rank was taken."""


def layer_from_tensors(leaves: Mapping[str, Tensor]) -> ModuleTensors:
    """The layer that a module's leaves make. Raises AdapterFormatError for factors that are missing or do not fit."""
    bias_name = next((name for name in ("diff_b", "b_norm") if name in leaves), None)
    bias = leaves[bias_name] if bias_name else None
    if bias is not None and (bias.ndim != 1 or not bias.is_floating_point()):
        raise AdapterFormatError(f"{bias_name} {tuple(bias.shape)} of type {bias.dtype}; expected (out,)")
    used = {bias_name} if bias_name else set()
    for name in ("diff", "w_norm"):
        if name in leaves:
            return ModuleTensors(layer=FullLayer(diff=leaves[name]), bias=bias, used=frozenset({*used, name}))
    kind = next((kind for kind in LOW_RANK if any(leaf in leaves for leaf in LOW_RANK[kind].values())), None)
    if kind is None:
        return ModuleTensors(bias=bias, used=frozenset(used))
    inner = build_low_rank_layer(kind, leaves)
    used |= set(LOW_RANK[kind].values()) | {ALPHA, MAGNITUDE}
    layer = DoRALayer(inner=inner, magnitude=leaves[MAGNITUDE]) if MAGNITUDE in leaves else inner
    return ModuleTensors(layer=layer, bias=bias, used=frozenset(used & set(leaves)), assumed_alpha=ALPHA not in leaves)


def build_low_rank_layer(kind: type[LowRank], leaves: Mapping[str, Tensor]) -> LowRank:
    """One of the low-rank kinds, with the alpha that the tools which write these files would use."""
    table = LOW_RANK[kind]
    factors = {field: leaves[leaf] for field, leaf in table.items() if leaf in leaves}
    missing = [field for field in NEEDED[kind] if field not in factors]
    if missing:
        whole = "its two factors" if kind is LoRALayer else f"its {len(NEEDED[kind])} factors"
        raise AdapterFormatError(f"has only a part of {whole} (no {', no '.join(missing)}); the file is incomplete")
    layer = kind(**factors, alpha=1.0)
    if isinstance(layer, LoKrLayer) and layer.w1 is not None and layer.w2 is not None:
        return layer  # two whole matrices have scale 1, whatever alpha the file says
    return with_alpha(layer, resolve_alpha(leaves.get(ALPHA), layer.rank))


def resolve_alpha(alpha: Tensor | None, rank: int) -> float:
    """kohya's rule: no alpha, or an alpha of 0, means the rank."""
    if alpha is None:
        return float(rank)
    if alpha.numel() != 1:
        raise AdapterFormatError(f"alpha of shape {tuple(alpha.shape)}; expected one number")
    return float(alpha) or float(rank)


def layer_to_tensors(layer: Layer | None, bias: Tensor | None) -> dict[str, Tensor]:
    """Split a layer into the tensors of a file, the inverse of `layer_from_tensors`.

    Two whole Kronecker factors give the same layer back only if their scale is 1.
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
    leaves |= {LOW_RANK[type(layer)][field]: factor for field, factor in layer.factors.items()}
    return {**leaves, ALPHA: alpha_tensor(layer.alpha)}


def alpha_tensor(alpha: float) -> Tensor:
    """Alpha in the narrowest type that holds it exactly: float32, or float64 for the square roots of rsLoRA."""
    import torch

    single = torch.tensor(alpha, dtype=torch.float32)
    return single if float(single) == alpha else torch.tensor(alpha, dtype=torch.float64)
