"""Analysis of adapters: spectra of each, overlap of each pair, and amplification of the base's directions.

Works module by module, so that only the spectra of one module are in memory at a time.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.layers import Layer
from lora_diffusion.algebra.metrics.amplification import Amplification, measure_amplification
from lora_diffusion.algebra.metrics.overlap import Overlap, measure_overlap, sum_overlaps
from lora_diffusion.algebra.metrics.spectra import SpectrumStats, measure_spectrum, summarize_block
from lora_diffusion.algebra.metrics.subspace_similarity import (
    SubspaceSimilarity,
    compare_subspaces,
    leading_directions,
    mean_grid,
)
from lora_diffusion.algebra.svd.svd import Spectrum, spectrum_of
from lora_diffusion.architectures.blocks import block_prefix
from lora_diffusion.architectures.families import family_title
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.formats.adapters.load import load_adapter

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AdapterStats:
    """Measurements of one adapter, by module path."""

    spectra: dict[str, SpectrumStats] = field(default_factory=dict[str, SpectrumStats])
    """Norm, ranks and singular values of the delta."""
    amplifications: dict[str, Amplification] = field(default_factory=dict[str, Amplification])
    """Comparison of the delta with the weight of the base, if a base is given."""
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Reasons why modules were left out."""


@dataclass(frozen=True, kw_only=True)
class PairStats:
    """Measurements of two adapters, by module path."""

    overlaps: dict[str, Overlap] = field(default_factory=dict[str, Overlap])
    """Overlap of the deltas."""
    inputs: dict[str, SubspaceSimilarity] = field(default_factory=dict[str, SubspaceSimilarity])
    """Similarity of the input directions, for modules that both change."""
    outputs: dict[str, SubspaceSimilarity] = field(default_factory=dict[str, SubspaceSimilarity])
    """Similarity of the output directions, for modules that both change."""


def analyze_files(
    paths: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] = "", ignore: Sequence[str] = ()
) -> Report:
    """Analyze adapter files.

    Args:
        paths: The adapter files.
        base: Base to compare the deltas with: `tiny-sd`, a folder, a single file or a hub id. Only the weights that the
            adapters change are read. Empty for no comparison.
        ignore: Patterns of keys that the files may contain although they are not understood.

    Returns:
        Plain values, ready for JSON: spectra of each adapter, overlap and similarity of each pair, and, with a base,
        amplification; each in total, by block and by module.

    Raises:
        ConfigError: If there is no file, or an adapter has no delta that is a matrix.
        FamilyMismatchError: If the adapters are for different bases, or do not fit `base`.
        AdapterFormatError: If a file cannot be read.
        BaseModelError: If the base is not found or cannot be read.
    """
    if not paths:
        raise ConfigError("no adapter to analyze; give at least one file")
    paths, base = [Path(path) for path in paths], os.fspath(base)
    adapters = [load_adapter(path, ignore=ignore) for path in paths]
    _check_same_base(adapters, paths)
    weight_of = _open_base_weights(base, adapters) if base else _no_base_weight
    adapter_stats = [AdapterStats() for _ in adapters]
    pair_stats = {pair: PairStats() for pair in combinations(range(len(adapters)), 2)}
    modules = sorted({module for adapter in adapters for module in adapter.layers})
    for module in tqdm(modules, desc="analyze", unit="module", leave=False):
        weight = weight_of(module)
        spectra = [_spectrum_at(*pair, module, weight) for pair in zip(adapters, adapter_stats, strict=True)]
        _add_adapter_stats(adapter_stats, spectra, module, weight)
        _add_pair_stats(pair_stats, spectra, module)
    for path, stats in zip(paths, adapter_stats, strict=True):
        if not stats.spectra:
            raise ConfigError(f"{path}: {_explain_no_spectra(stats)}")
    names = _make_distinct_names(adapters, paths)
    pairs = [_pair_to_json(names[i], names[j], stats) for (i, j), stats in pair_stats.items()]
    return {
        "base": base,
        "names": names,
        "adapters": [_adapter_to_json(*each) for each in zip(names, paths, adapters, adapter_stats, strict=True)],
        "pairs": pairs,
        "cosine": _make_matrix(pairs, names, "cosine"),
        "shared": _make_matrix(pairs, names, "shared"),
    }


def _check_same_base(adapters: Sequence[Adapter], paths: Sequence[Path]) -> None:
    """Raise FamilyMismatchError unless the families and the shapes of common modules are equal."""
    for (one, first), (two, second) in combinations(zip(adapters, paths, strict=True), 2):
        families = one.metadata.family, two.metadata.family
        if all(families) and families[0] != families[1]:
            titles = [family_title(family) for family in families]
            raise FamilyMismatchError(
                f"{first} is an adapter for {titles[0]} and {second} for {titles[1]}; analyze one family at a time"
            )
        for module in one.layers.keys() & two.layers.keys():
            sizes = [torch.Size(adapter.layers[module].weight_shape) for adapter in (one, two)]
            if sizes[0][0] != sizes[1][0] or sizes[0].numel() != sizes[1].numel():
                raise FamilyMismatchError(
                    f"{module} is of shape {tuple(sizes[0])} in {first} and {tuple(sizes[1])} in {second}; "
                    "analyze adapters of one base"
                )


def _open_base_weights(base: str, adapters: Sequence[Adapter]) -> Callable[[str], Tensor | None]:
    """Return a function that reads the base's weight of a module that an adapter changes."""
    from lora_diffusion.models.locate import find_matching_checkpoint  # slow to import, and nothing else here needs it

    blend = Blend(entries=tuple(WeightedAdapter(adapter=adapter) for adapter in adapters))
    parameters = find_matching_checkpoint(base, blend).parameters
    return lambda module: parameters[f"{module}.weight"].read()


def _no_base_weight(_module: str) -> None:
    """Stand in for the function of `_open_base_weights` if no base is given."""


def _spectrum_at(adapter: Adapter, stats: AdapterStats, module: str, weight: Tensor | None) -> Spectrum | None:
    """Return the spectrum of an adapter's delta at a module; if it has none, None, with the reason in `stats`."""
    layer = adapter.layers.get(module)
    if layer is None:
        return None
    reason = _explain_no_spectrum(layer, weight)
    if reason:
        stats.left_out[module] = reason
        return None
    return spectrum_of([(1.0, layer)], weight)


def _explain_no_spectrum(layer: Layer, weight: Tensor | None) -> str:
    """Explain why a layer's delta cannot be decomposed; empty if it can."""
    if len(layer.weight_shape) < 2:
        return "the weight of a norm is not a matrix"
    return "DoRA needs the base's weight" if layer.kind == "DoRA" and weight is None else ""


def _explain_no_spectra(stats: AdapterStats) -> str:
    """Explain why no layer of an adapter could be analyzed."""
    if "DoRA needs the base's weight" in stats.left_out.values():
        return "its layers are DoRA, whose delta depends on the base; give the base with --base"
    return "no layer whose delta is a matrix; expected LoRA, LoHa, LoKr, DoRA or full differences of weights"


def _add_adapter_stats(
    adapter_stats: Sequence[AdapterStats], spectra: Sequence[Spectrum | None], module: str, weight: Tensor | None
) -> None:
    """Add the measurements of one module to those of each adapter."""
    for stats, spectrum in zip(adapter_stats, spectra, strict=True):
        if spectrum is not None:
            stats.spectra[module] = measure_spectrum(spectrum)
        if spectrum is not None and weight is not None:
            stats.amplifications[module] = measure_amplification(spectrum, weight)


def _add_pair_stats(
    pair_stats: Mapping[tuple[int, int], PairStats], spectra: Sequence[Spectrum | None], module: str
) -> None:
    """Add the measurements of one module to those of each pair of adapters."""
    directions = [None if spectrum is None else leading_directions(spectrum) for spectrum in spectra]
    for (i, j), stats in pair_stats.items():
        if spectra[i] is None and spectra[j] is None:
            continue
        stats.overlaps[module] = measure_overlap(spectra[i], spectra[j])
        nonzero = [each for each in (directions[i], directions[j]) if each is not None and each.output.shape[1]]
        if len(nonzero) == 2:
            stats.inputs[module] = compare_subspaces(nonzero[0].input, nonzero[1].input)
            stats.outputs[module] = compare_subspaces(nonzero[0].output, nonzero[1].output)


def _make_distinct_names(adapters: Sequence[Adapter], paths: Sequence[Path]) -> list[str]:
    """Return distinct display names: those in the metadata, or the file names, or the file names with numbers."""
    titles, stems = [adapter.metadata.name for adapter in adapters], [path.stem for path in paths]
    numbered = [f"{stem} ({number})" for number, stem in enumerate(stems, start=1)]
    return next(names for names in (titles, stems, numbered) if len(set(names)) == len(names) and all(names))


def _group_by_block(modules: Iterable[str]) -> dict[str, list[str]]:
    """Group module paths by block."""
    blocks: dict[str, list[str]] = {}
    for module in modules:
        blocks.setdefault(block_prefix(module), []).append(module)
    return blocks


def _adapter_to_json(name: str, path: Path, adapter: Adapter, stats: AdapterStats) -> Report:
    """Return the measurements of one adapter in total, by block and by module."""
    blocks = _group_by_block(stats.spectra)
    report: Report = {
        "name": name,
        "file": str(path),
        "hash": adapter.hash,
        "family": family_title(adapter.metadata.family) or "unknown",
        "kind": ", ".join(adapter.kinds),
        "whole": asdict(summarize_block(list(stats.spectra.values()))),
        "blocks": {
            block: asdict(summarize_block([stats.spectra[m] for m in inside])) for block, inside in blocks.items()
        },
        "modules": {module: asdict(spectrum) for module, spectrum in stats.spectra.items()},
        "left_out": stats.left_out,
    }
    if stats.amplifications:
        amplified = stats.amplifications
        report["amplification"] = {
            "whole": _median_amplification(list(amplified.values())),
            "blocks": {
                block: _median_amplification([amplified[m] for m in inside]) for block, inside in blocks.items()
            },
            "modules": {module: asdict(each) for module, each in amplified.items()},
        }
    return report


def _median_amplification(amplifications: Sequence[Amplification]) -> Report:
    """Return the median of each measurement over modules; None for one that no module has."""
    columns = {name: [getattr(each, name) for each in amplifications] for name in Amplification.__dataclass_fields__}
    known = {name: [value for value in values if value is not None] for name, values in columns.items()}
    return {name: median(values) if values else None for name, values in known.items()}


def _pair_to_json(first: str, second: str, stats: PairStats) -> Report:
    """Return the measurements of two adapters in total, by block and by module."""
    return {
        "first": first,
        "second": second,
        "modules_in_both": len(stats.inputs),
        **_overlap_to_json(sum_overlaps(stats.overlaps.values())),
        "input": _similarity_to_json(list(stats.inputs.values())),
        "output": _similarity_to_json(list(stats.outputs.values())),
        "blocks": {
            block: _overlap_to_json(sum_overlaps(stats.overlaps[module] for module in inside))
            for block, inside in _group_by_block(stats.overlaps).items()
        },
        "modules": {module: _overlap_to_json(overlap) for module, overlap in stats.overlaps.items()},
    }


def _overlap_to_json(overlap: Overlap) -> Report:
    """Return cosine and shares: `shared` measures interference, `chance` is its expectation for random deltas."""
    return {name: getattr(overlap, name) for name in ("cosine", "shared", "chance", "first_share", "second_share")}


def _similarity_to_json(similarities: Sequence[SubspaceSimilarity]) -> Report:
    """Return means over modules of phi, for all directions and for each pair of ranks; empty for no modules."""
    if not similarities:
        return {}
    return {
        "phi": fmean(float(each.similarity[-1, -1]) for each in similarities),
        "random_phi": fmean(float(each.random[-1, -1]) for each in similarities),
        "distance": median(each.distance for each in similarities),
        "largest_distance": median(each.largest_distance for each in similarities),
        "similarity": _average_grids([each.similarity for each in similarities]),
        "random": _average_grids([each.random for each in similarities]),
    }


def _average_grids(grids: Sequence[Tensor]) -> list[list[float]]:
    """Return the mean of grids of (rank, rank) values, rounded to four decimals to keep the JSON short."""
    mean: list[list[float]] = cast(Any, mean_grid(grids)).tolist()  # Tensor.tolist has no element type
    return [[round(value, 4) for value in row] for row in mean]


def _make_matrix(pairs: Sequence[Report], names: Sequence[str], key: str) -> list[list[float]]:
    """Return one measurement of all pairs as a symmetric matrix in the order of `names`, with 1 on the diagonal."""
    values = {(pair["first"], pair["second"]): pair[key] for pair in pairs}
    values |= {(second, first): value for (first, second), value in values.items()}
    return [[values.get((row, column), 1.0) for column in names] for row in names]
