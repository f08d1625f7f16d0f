"""A blend as one adapter of small rank: the closest at every module, with what was lost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.factor_stack import Term, common_weight_shape
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.algebra.combine.exact_sum import sum_biases, sum_full_layers
from lora_diffusion.algebra.svd.rank_selection import RankRule, select_rank
from lora_diffusion.algebra.svd.svd import lost_norm, spectrum_norm, spectrum_of, truncate_spectrum
from lora_diffusion.errors import ConfigError

LINALG: Any = torch.linalg  # whose own stub does not export its error


@dataclass(frozen=True, kw_only=True)
class ModuleLoss:
    """What compression took from one module."""

    rank_before: int
    """Sum of the LoRA layers' ranks, or the smaller side of the weight where another kind has no such rank."""
    rank_after: int
    norm: float
    """Frobenius norm of the delta before."""
    lost: float
    """Frobenius norm of the delta before minus that after."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What compression took from several modules together."""

    modules: int
    ranks_before: tuple[int, int]
    """Lowest and highest."""
    ranks_after: tuple[int, int]
    norm: float
    """Root of the summed squares of the modules' norms."""
    lost: float

    @property
    def relative(self) -> float:
        """The error: norm of what was lost over the norm of the delta."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What compression took, module by module. Norms and biases, which are kept exactly, are not in it."""

    modules: Mapping[str, ModuleLoss]

    @property
    def total(self) -> Loss:
        return sum_losses(tuple(self.modules.values()))

    def by_group(self, group: Callable[[str], str]) -> dict[str, Loss]:
        """The same by groups of module paths, such as blocks."""
        groups: dict[str, list[ModuleLoss]] = {}
        for path, loss in self.modules.items():
            groups.setdefault(group(path), []).append(loss)
        return {name: sum_losses(losses) for name, losses in groups.items()}


def sum_losses(losses: Sequence[ModuleLoss]) -> Loss:
    """Several modules as one; their deltas are parts of one long vector, so that squared norms add up."""
    before, after = [loss.rank_before for loss in losses] or [0], [loss.rank_after for loss in losses] or [0]
    return Loss(
        modules=len(losses),
        ranks_before=(min(before), max(before)),
        ranks_after=(min(after), max(after)),
        norm=math.hypot(*(loss.norm for loss in losses)),
        lost=math.hypot(*(loss.lost for loss in losses)),
    )


def compress(total: BlendSum, rule: RankRule, metadata: AdapterMetadata) -> tuple[Adapter, CompressionReport]:
    """The LoRA adapter whose delta at every module is the closest to the blend's among those of the rule's rank.

    Layers of every kind go through their sum; differences of one dimension, as norms have, and biases are summed as
    they are. Raises ConfigError for DoRA, which is no sum without its base, and for sums beyond the range of float32.
    """
    layers: dict[str, Layer] = {}
    losses: dict[str, ModuleLoss] = {}
    for path, terms in tqdm(total.layers.items(), desc="compress", unit="module", leave=False, disable=None):
        if len(common_weight_shape(terms)) == 1:
            layers[path] = sum_full_layers(terms)
        else:
            layers[path], losses[path] = compress_layer(path, terms, rule)
    adapter = Adapter(layers=layers, biases=sum_biases(total), metadata=metadata)
    return adapter, CompressionReport(modules=losses)


def compress_layer(path: str, terms: Sequence[Term], rule: RankRule) -> tuple[Layer, ModuleLoss]:
    """One module's layer, and what it lost."""
    if any(layer.kind == "DoRA" for _, layer in terms):
        raise ConfigError(f"{path}: the delta of a DoRA layer depends on the base's weight; name the base with --base")
    try:
        spectrum = spectrum_of(terms)
    except LINALG.LinAlgError:
        raise ConfigError(f"{path}: the sum of deltas is beyond the range of float32; lower the weights") from None
    spectrum = replace(spectrum, shape=common_weight_shape(terms))  # some terms may have their kernel flattened
    rank = select_rank(rule, spectrum.values)
    loss = ModuleLoss(
        rank_before=spectrum.values.numel(),
        rank_after=rank,
        norm=spectrum_norm(spectrum),
        lost=lost_norm(spectrum, rank),
    )
    return truncate_spectrum(spectrum, rank), loss
