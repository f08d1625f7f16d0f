"""Extraction of adapters: the difference of two checkpoints at low rank, or the low-rank part of one checkpoint."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora_diffusion.adapters.adapter import Adapter, AdapterMetadata
from lora_diffusion.adapters.compatibility import is_same_weight
from lora_diffusion.adapters.layers import FullLayer
from lora_diffusion.algebra.reduce.extract import (
    Approximation,
    Extraction,
    approximate_layers,
    check_finite_weights,
    extract_layers,
    frobenius_norm,
    subtract_weights,
)
from lora_diffusion.algebra.svd.randomized_svd import Sketch
from lora_diffusion.architectures.module_paths import changeable_paths
from lora_diffusion.architectures.targets import resolve_targets
from lora_diffusion.config.adapter_files import ExtractConfig, SVDMethod
from lora_diffusion.core.atomic_files import check_output
from lora_diffusion.core.dtypes import torch_dtype
from lora_diffusion.errors import ConfigError, FamilyMismatchError
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.formats.checkpoints.checkpoint import Checkpoint
from lora_diffusion.formats.checkpoints.diffusers import read_json
from lora_diffusion.models.locate import find_checkpoint

_SKETCHES: Mapping[SVDMethod, Sketch | None] = {"exact": None, "randomized": Sketch()}


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters of one kind that were left out."""

    count: int
    """Number of parameters."""
    norm: float
    """Norm of the differences of all of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtractResult:
    """An extracted adapter file, and the differences that it does not contain."""

    tuned: str
    """The fine-tuned checkpoint; empty for the low-rank part of the base itself."""
    base: str
    """The base."""
    output: Path
    """The file that was written."""
    config: ExtractConfig
    """The settings."""
    extraction: Extraction
    """The low-rank layers and their errors."""
    kept: Mapping[str, Tensor] = field(repr=False)
    """Differences of norms and biases in the file, by name of the parameter."""
    left_out: Mapping[str, ParameterGroup]
    """Differences that are not in the file, by kind."""

    @property
    def left_out_norm(self) -> float:
        """Norm of all differences that were left out."""
        return hypot(*(group.norm for group in self.left_out.values()))

    @property
    def whole_norm(self) -> float:
        """Norm of all differences in UNet and text encoders."""
        return hypot(self.extraction.report.total.norm, self.left_out_norm, *map(frobenius_norm, self.kept.values()))

    @property
    def whole_error(self) -> float:
        """Norm of all differences that the file lacks, divided by the norm of all differences."""
        return hypot(self.extraction.report.total.lost, self.left_out_norm) / self.whole_norm


def extract_file(
    tuned: str | os.PathLike[str], base: str | os.PathLike[str], output: str | os.PathLike[str], config: ExtractConfig
) -> ExtractResult:
    """Write the difference between a fine-tuned checkpoint and its base as an adapter in the native format.

    One module is in memory at a time, in addition to the result. The VAE is ignored, since no adapter changes it.

    Args:
        tuned: The fine-tuned checkpoint: `tiny-sd`, a folder, a single file or a hub id.
        base: The checkpoint that it was made from.
        output: The .safetensors file to write.
        config: Settings: rank, method, targets and dtype.

    Raises:
        FamilyMismatchError: If the two checkpoints have different modules or shapes.
        ConfigError: If nothing differs at the targets, or a target matches no module.
        OutputError: If `output` is an input, exists without `config.force`, or cannot be written.
        BaseModelError: If a checkpoint is not found, cannot be read or contains NaN.
    """
    tuned, base, output = os.fspath(tuned), os.fspath(base), Path(output)
    first, second = find_checkpoint(base), find_checkpoint(tuned)
    check_output(output, (*_list_files(first), *_list_files(second)), force=config.force)
    _check_same_architecture(first, second)
    names = _select_names(first, config)
    pairs = ((_parameter_module(n), first.parameters[n].read(), second.parameters[n].read()) for n in _progress(names))
    extraction = extract_layers(pairs, _make_approximation(config, _list_stored_dtypes((first, second), names)))
    kept, left_out = _split_kept_and_skipped(
        _iterate_differences(first, second, _remaining_parameters(first, names)), _target_paths(first, config), config
    )
    if not extraction.layers and not kept:
        raise ConfigError(_explain_no_difference(tuned, base, left_out))
    result = ExtractResult(
        tuned=tuned, base=base, output=output, config=config, extraction=extraction, kept=kept, left_out=left_out
    )
    metadata = AdapterMetadata(
        name=output.stem,
        family=first.family.name,
        variant=_detect_variant(first),
        base_name=base,
        base_hash=first.hash,
        description=f"Extracted from {second.path.name}: its difference from the base, {config.rule}.",
        training={"extraction": {"tuned": tuned, "tuned_hash": second.hash, **_make_record(result)}},
    )
    save_adapter(_make_adapter(result, metadata), output)
    return result


def approximate_file(
    base: str | os.PathLike[str], output: str | os.PathLike[str], config: ExtractConfig
) -> ExtractResult:
    """Write the low-rank part of a checkpoint's own weights in the format of an adapter.

    The result is not a change to a base. Its family is `low-rank part of ...`, so that all commands refuse to add it
    to a base. Norms, biases and embeddings are left out.

    Args:
        base: The checkpoint: `tiny-sd`, a folder, a single file or a hub id.
        output: The .safetensors file to write.
        config: Settings: rank, method, targets and dtype.

    Raises:
        ConfigError: If all weights at the targets are zero, or a target matches no module.
        OutputError: If `output` is an input, exists without `config.force`, or cannot be written.
        BaseModelError: If the checkpoint is not found, cannot be read or contains NaN.
    """
    base, output = os.fspath(base), Path(output)
    source = find_checkpoint(base)
    check_output(output, _list_files(source), force=config.force)
    names = _select_names(source, config)
    weights = ((_parameter_module(name), weight) for name, weight in _iterate_values(source, _progress(names)))
    extraction = approximate_layers(weights, _make_approximation(config, _list_stored_dtypes((source,), names)))
    if not extraction.layers:
        raise ConfigError(f"{base}: all weights at the targets are zero; there is nothing to approximate")
    _, left_out = _split_kept_and_skipped(_iterate_values(source, _remaining_parameters(source, names)), (), config)
    result = ExtractResult(
        tuned="", base=base, output=output, config=config, extraction=extraction, kept={}, left_out=left_out
    )
    metadata = AdapterMetadata(
        name=f"low-rank part of {source.path.name}",
        family=f"low-rank part of {source.family.title}",
        base_name=base,
        base_hash=source.hash,
        description="The base's own weights at low rank, not a change to them: do not add it to a base.",
        training={"approximation": _make_record(result)},
    )
    save_adapter(_make_adapter(result, metadata), output)
    return result


def _make_record(result: ExtractResult) -> dict[str, Any]:
    """Return how the file was made, for its metadata."""
    config, total = result.config, result.extraction.report.total
    return {
        "rule": str(config.rule),
        "method": config.method,
        "unet_target_modules": list(config.unet_target_modules),
        "text_encoder_target_modules": list(config.text_encoder_target_modules),
        "relative_error": total.relative,
        "left_out": {kind: asdict(group) for kind, group in result.left_out.items()},
        "whole_error": result.whole_error,
    }


def _list_files(checkpoint: Checkpoint) -> list[Path]:
    """Return all files of a checkpoint."""
    return [p for p in checkpoint.path.rglob("*") if p.is_file()] if checkpoint.is_folder else [checkpoint.path]


def _check_same_architecture(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise FamilyMismatchError unless both have the same parameters, apart from tokens that were added."""
    if tuned.family is not base.family:
        raise FamilyMismatchError(
            f"{tuned.path} is {tuned.family.title}, but {base.path} is {base.family.title}; "
            "give the base that it was made from"
        )
    base_shapes, tuned_shapes = base.shapes, tuned.shapes
    for name in (*base_shapes, *(name for name in tuned_shapes if name not in base_shapes)):
        old, new = base_shapes.get(name), tuned_shapes.get(name)
        if old is None or new is None or not (is_same_weight(new, old) or _may_grow(name, old, new)):
            raise FamilyMismatchError(
                f"{name} is {new or 'missing'} in {tuned.path}, but {old or 'missing'} in {base.path}; "
                "give the base that it was made from"
            )


def _may_grow(name: str, one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return name.endswith(".token_embedding.weight") and one[1:] == two[1:]


def _target_paths(checkpoint: Checkpoint, config: ExtractConfig) -> tuple[str, ...]:
    """Return the modules, norms included, that the targets match. Raise ConfigError if one matches none."""
    paths = changeable_paths(checkpoint.layout)
    return resolve_targets(paths, unet=config.unet_target_modules, text_encoders=config.text_encoder_target_modules)


def _select_names(checkpoint: Checkpoint, config: ExtractConfig) -> list[str]:
    """Select the weights that get a layer: those of two or four dimensions among the targets."""
    names = [f"{path}.weight" for path in _target_paths(checkpoint, config)]
    return [name for name in names if name in checkpoint.parameters and len(checkpoint.shapes[name]) > 1]


def _parameter_module(name: str) -> str:
    """Return the module of a parameter."""
    return name.rpartition(".")[0]


def _progress(names: Sequence[str]) -> Iterable[str]:
    """Iterate over the names, with a _progress bar on a terminal."""
    return tqdm(names, desc="extract", unit="module", leave=False, disable=None)


def _list_stored_dtypes(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> set[str]:
    """List the types in which the weights are stored."""
    return {checkpoint.parameters[name].kind[0] for checkpoint in checkpoints for name in names}


def _make_approximation(config: ExtractConfig, types: set[str]) -> Approximation:
    """Return the settings of the approximation. Raise ConfigError for the randomized method without a fixed rank."""
    stored = types.pop() if types in ({"float16"}, {"bfloat16"}) else "float32"
    dtype = torch_dtype(stored if config.dtype == "keep" else config.dtype)
    return Approximation(rule=config.rule, sketch=_SKETCHES[config.method], dtype=dtype)


def _remaining_parameters(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """Return the names of all other parameters."""
    taken = set(names)
    return [name for name in checkpoint.parameters if name not in taken]


def _iterate_values(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters in float32, one at a time."""
    return ((name, checkpoint.parameters[name].read().float()) for name in names)


def _iterate_differences(base: Checkpoint, tuned: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the difference of each parameter; rows that only one checkpoint has are the difference themselves."""
    for name in names:
        old, new = base.parameters[name].read(), tuned.parameters[name].read()
        rows = min(len(old), len(new))
        longer = max(old, new, key=len)
        yield name, torch.cat([subtract_weights(old[:rows], new[:rows]), longer[rows:].float()])


def _split_kept_and_skipped(
    parameters: Iterable[tuple[str, Tensor]], targets: Sequence[str], config: ExtractConfig
) -> tuple[dict[str, Tensor], dict[str, ParameterGroup]]:
    """Split nonzero differences into norms and biases that are kept, and all others grouped by kind.

    Raises:
        BaseModelError: If a value is NaN or infinite.
    """
    kept: dict[str, Tensor] = {}
    norms: dict[str, list[float]] = {}
    for name, values in check_finite_weights(parameters):
        if not values.any():
            continue
        if config.norms_and_biases == "keep" and values.ndim == 1 and _parameter_module(name) in targets:
            kept[name] = values
        else:
            norms.setdefault(_parameter_kind(name, values), []).append(frobenius_norm(values))
    return kept, {kind: ParameterGroup(count=len(found), norm=hypot(*found)) for kind, found in norms.items()}


def _parameter_kind(name: str, values: Tensor) -> str:
    """Return the kind of a parameter that was left out, for the report."""
    if "_embedding.weight" in name:
        return "embeddings"
    if name.endswith(".bias"):
        return "biases"
    return "norm weights" if values.ndim == 1 else "modules beyond the targets"


def _explain_no_difference(tuned: str, base: str, left_out: Mapping[str, ParameterGroup]) -> str:
    if not left_out:
        return f"{tuned}: nothing to extract; its UNet and text encoders are equal to those of {base}"
    return (
        f"{tuned}: nothing to extract at the targets; only {format_groups(left_out)} differ from {base}; "
        "give more targets, or keep norms and biases"
    )


def format_groups(left_out: Mapping[str, ParameterGroup]) -> str:
    """Format groups of parameters as text, such as `biases (2), norm weights (1)`."""
    return ", ".join(f"{kind} ({found.count})" for kind, found in left_out.items())


def _detect_variant(base: Checkpoint) -> str:
    """Return `v-prediction` if the scheduler of a folder has this prediction type; single files do not state it."""
    scheduler = base.path / "scheduler" / "scheduler_config.json"
    prediction_type = read_json(scheduler).get("prediction_type") if scheduler.is_file() else None
    return "v-prediction" if prediction_type == "v_prediction" else ""


def _make_adapter(result: ExtractResult, metadata: AdapterMetadata) -> Adapter:
    norms = {
        _parameter_module(name): FullLayer(diff=diff) for name, diff in result.kept.items() if name.endswith(".weight")
    }
    biases = {_parameter_module(name): bias for name, bias in result.kept.items() if name.endswith(".bias")}
    return Adapter(layers={**result.extraction.layers, **norms}, biases=biases, metadata=metadata)
