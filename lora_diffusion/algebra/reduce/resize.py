"""Compress a blend into one LoRA adapter of lower rank, and report the approximation error."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.factor_stack import Term, common_weight_shape
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.algebra.combine.exact_sum import sum_biases, sum_full_layers
from lora_diffusion.algebra.svd.rank_selection import select_rank
from lora_diffusion.algebra.svd.svd import lost_norm, spectrum_norm, spectrum_of, truncate_spectrum
from lora_diffusion.config.combine import RankRule
from lora_diffusion.errors import ConfigError

_LINALG: Any = torch.linalg  # PyTorch's stub does not export LinAlgError


@dataclass(frozen=True, kw_only=True)
class ModuleLoss:
    """Approximation error of one module."""

    rank_before: int
    """Sum of the ranks of the LoRA layers; min(out, in * kh * kw) if a layer of another kind is among them."""
    rank_after: int
    """Rank of the approximation."""
    norm: float
    """Frobenius norm of the delta before."""
    lost: float
    """Frobenius norm of the difference of the deltas before and after."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Approximation error of several modules together."""

    modules: int
    """Number of modules."""
    ranks_before: tuple[int, int]
    """Lowest and highest rank before."""
    ranks_after: tuple[int, int]
    """Lowest and highest rank after."""
    norm: float
    """Frobenius norm of all deltas before."""
    lost: float
    """Frobenius norm of all differences of the deltas before and after."""

    @property
    def relative(self) -> float:
        """Relative error: `lost` / `norm`, or 0 if `norm` is 0."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """Approximation error by module path, without biases and norm weights, which are not approximated."""

    modules: Mapping[str, ModuleLoss] = field(repr=False)
    """Errors by module path."""

    @property
    def total(self) -> Loss:
        """Error of all modules together."""
        return _sum_losses(tuple(self.modules.values()))

    def by_group(self, group: Callable[[str], str]) -> dict[str, Loss]:
        """Aggregate the errors by groups of modules, such as UNet blocks.

        Args:
            group: Maps a module path to the name of its group.
        """
        groups: dict[str, list[ModuleLoss]] = {}
        for path, loss in self.modules.items():
            groups.setdefault(group(path), []).append(loss)
        return {name: _sum_losses(losses) for name, losses in groups.items()}


def _sum_losses(losses: Sequence[ModuleLoss]) -> Loss:
    """Aggregate the errors of several modules; squared norms add up."""
    before, after = [loss.rank_before for loss in losses] or [0], [loss.rank_after for loss in losses] or [0]
    return Loss(
        modules=len(losses),
        ranks_before=(min(before), max(before)),
        ranks_after=(min(after), max(after)),
        norm=math.hypot(*(loss.norm for loss in losses)),
        lost=math.hypot(*(loss.lost for loss in losses)),
    )


def compress(total: BlendSum, rule: RankRule, metadata: AdapterMetadata) -> tuple[Adapter, CompressionReport]:
    """Approximate a blend by one LoRA adapter, with a rank per module that a rule chooses.

    Each layer is the best approximation of its rank in the Frobenius norm, whatever the kinds of the layers in the sum.
    One-dimensional differences, such as those of norm weights, and biases are summed exactly.

    Args:
        total: Weighted layers by module path, as `joint_sum` returns them.
        rule: Chooses the rank of each module.
        metadata: Metadata of the new adapter.

    Returns:
        The adapter and its approximation error.

    Raises:
        ConfigError: If a layer is DoRA, whose delta depends on the base, or a sum exceeds the range of float32.
    """
    layers: dict[str, Layer] = {}
    losses: dict[str, ModuleLoss] = {}
    for path, terms in tqdm(total.layers.items(), desc="compress", unit="module", leave=False, disable=None):
        if len(common_weight_shape(terms)) == 1:
            layers[path] = sum_full_layers(terms)
        else:
            layers[path], losses[path] = _compress_layer(path, terms, rule)
    adapter = Adapter(layers=layers, biases=sum_biases(total), metadata=metadata)
    return adapter, CompressionReport(modules=losses)


def _compress_layer(path: str, terms: Sequence[Term], rule: RankRule) -> tuple[Layer, ModuleLoss]:
    if any(layer.kind == "DoRA" for _, layer in terms):
        raise ConfigError(
            f"{path}: the delta of a DoRA layer depends on the base weight; pass the base model with --base"
        )
    try:
        spectrum = spectrum_of(terms)
    except _LINALG.LinAlgError:
        raise ConfigError(f"{path}: the sum of the deltas is beyond the range of float32; lower the weights") from None
    spectrum = replace(spectrum, shape=common_weight_shape(terms))  # some terms may have their kernel flattened
    rank = select_rank(rule, spectrum.values)
    loss = ModuleLoss(
        rank_before=spectrum.values.numel(),
        rank_after=rank,
        norm=spectrum_norm(spectrum),
        lost=lost_norm(spectrum, rank),
    )
    return truncate_spectrum(spectrum, rank), loss
