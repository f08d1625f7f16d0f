"""Trained parameters and file sizes of the training methods on a base, computed from the shapes of its weights."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from lora_diffusion.architectures.module_paths import changeable_paths, trainable_paths
from lora_diffusion.architectures.targets import resolve_modules_to_save, resolve_patterns, resolve_targets
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.config.defaults import default_settings
from lora_diffusion.config.methods import METHODS, Method, with_method
from lora_diffusion.config.settings import deep_merge, validate
from lora_diffusion.config.textual_inversion import TextualInversionConfig
from lora_diffusion.core.tables import format_table
from lora_diffusion.models.locate import find_checkpoint

Shape = tuple[int, ...]
_FILE_BYTES = 2
"""Bytes per value of an adapter file in float16, the default type."""


@dataclass(frozen=True, kw_only=True)
class MethodSize:
    """Trained parameters and file size of a method."""

    method: str
    """Name of the method."""
    rank: int
    """Rank of the layers."""
    modules: int
    """Number of modules that are trained."""
    trained: int
    """Number of trained parameters."""
    saved: int
    """Number of values in the file; for methods that prune, after pruning."""
    share: float
    """Trained parameters divided by the parameters of the base."""
    megabytes: float
    """Size of the file in MB."""


def _count_numbers(config: AdapterConfig, shape: Shape, rank: int) -> tuple[int, int]:
    """Count the trained parameters and the saved values of one module whose weight is (out, in[, kh, kw])."""
    out, inputs = shape[0], prod(shape[1:])
    pair = rank * (inputs + out)
    magnitude = out if config.use_dora else 0
    match config.kind:
        case "loha":
            return 2 * pair + magnitude, 2 * pair + magnitude
        case "lokr":
            numbers = _count_kronecker_numbers(shape, rank, config.decompose_factor)
            return numbers + magnitude, numbers + magnitude
        case "vera":
            return rank + out, pair
        case "adalora":
            init_rank = round(rank * config.adalora_init_ratio)
            return init_rank * (inputs + out + 1), pair
        case "sparse":
            return pair + rank, round(pair * config.sparse_keep)
        case _:
            trained = rank * out if config.freeze_down else pair
            return trained + magnitude, pair * (2 if config.init_weights == "pissa" else 1) + magnitude


def _count_kronecker_numbers(shape: Shape, rank: int, max_factor: int) -> int:
    """Count the values of LoKr's small matrix and of its large one, in full or at low rank, whichever is smaller."""
    small_out, small_in = (max(d for d in range(1, max_factor + 1) if side % d == 0) for side in shape[:2])
    out, inputs = shape[0] // small_out, prod(shape[1:]) // small_in
    return small_out * small_in + min(rank * (out + inputs), out * inputs)


def measure_method(method: Method, base: str, rank: int | None = None) -> MethodSize:
    """Compute the size of a method with the default settings of a style.

    Args:
        method: The method.
        base: `tiny-sd`, a folder, a single file or a hub id; only headers are read.
        rank: Rank of the layers instead of the default.

    Raises:
        BaseModelError: If the base is not found or cannot be read.
        ConfigError: If the settings do not fit the base.
    """
    checkpoint = find_checkpoint(base)
    table = with_method(default_settings("style", checkpoint.family.name), method)
    changes = {"rank": rank} if rank else {}
    config = validate(AdapterConfig, deep_merge(table["adapter"], changes), source=f"methods {method.name}")
    tokens = validate(TextualInversionConfig, table.get("textual_inversion", {}), source=f"methods {method.name}")
    return measure_config(method.name, base, config, tokens)


def measure_config(name: str, base: str, config: AdapterConfig, tokens: TextualInversionConfig) -> MethodSize:
    """Compute the size of an adapter with the given settings.

    Args:
        name: Name of the method, for the result.
        base: `tiny-sd`, a folder, a single file or a hub id; only headers are read.
        config: Settings of the adapter.
        tokens: Settings of textual inversion.

    Raises:
        BaseModelError: If the base is not found or cannot be read.
        ConfigError: If the settings do not fit the base.
    """
    checkpoint = find_checkpoint(base)
    unet, text = config.unet_target_modules, config.text_encoder_target_modules
    paths = resolve_targets(trainable_paths(checkpoint.layout), unet=unet, text_encoders=text)
    full = resolve_modules_to_save(changeable_paths(checkpoint.layout), config.modules_to_save, paths)
    shapes: Mapping[str, Shape] = {name: tuple(stored.kind[1]) for name, stored in checkpoint.parameters.items()}
    vectors = sum(
        tokens.num_vectors
        * len(tokens.placeholder_tokens)
        * shapes[f"{component}.text_model.embeddings.token_embedding.weight"][1]
        for component in checkpoint.layout.text_layers
    )
    if tokens.placeholder_tokens and tokens.start_adapter_at == 1:
        paths, full = (), ()
    ranks = resolve_patterns(paths, config.rank_pattern, "adapter.rank_pattern", config.rank)
    sizes = [_count_numbers(config, shapes[f"{path}.weight"], ranks[path]) for path in paths]
    whole = sum(prod(shapes.get(f"{path}.{part}", (0,))) for path in full for part in ("weight", "bias"))
    trained, saved = (sum(size[side] for size in sizes) + whole + vectors for side in (0, 1))
    total = sum(map(prod, shapes.values()))
    # magnitudes of DoRA are saved in float32, which takes twice the bytes
    magnitudes = sum(shapes[f"{path}.weight"][0] for path in paths) if config.use_dora else 0
    return MethodSize(
        method=name,
        rank=config.rank,
        modules=len(paths) + len(full),
        trained=trained,
        saved=saved,
        share=trained / total,
        megabytes=(saved + magnitudes) * _FILE_BYTES / 1e6,
    )


def list_methods(base: str, rank: int | None, names: Sequence[str]) -> list[tuple[Method, MethodSize]]:
    """Return methods with their sizes.

    Args:
        base: `tiny-sd`, a folder, a single file or a hub id.
        rank: Rank of the layers instead of each method's default.
        names: Names of the methods; empty for all methods.

    Raises:
        BaseModelError: If the base is not found or cannot be read.
    """
    return [(each, measure_method(each, base, rank)) for each in METHODS if not names or each.name in names]


def format_methods(methods: Sequence[tuple[Method, MethodSize]], base: str) -> str:
    """Format methods and sizes as a table with a paragraph for each method."""
    rows = [
        [
            method.name,
            str(size.rank),
            f"{size.trained:,}",
            f"{size.share:.2%}",
            f"{size.megabytes:.2f}",
            " ".join(f"--set '{line}'" for line in method.lines) or "(the defaults)",
        ]
        for method, size in methods
    ]
    table = format_table(["method", "rank", "trained", "of the base", "file, MB", "settings"], rows, left=(0, -1))
    wrap = textwrap.TextWrapper(width=100, initial_indent="  ", subsequent_indent="  ")
    about = [f"{method.name} [{_format_source(method)}]\n{wrap.fill(method.about)}" for method, _ in methods]
    return "\n".join([f"Sizes on {base}, with the default settings for a style:", table, "", *about])


def _format_source(method: Method) -> str:
    return f"arXiv:{method.paper}"


def to_json(methods: Sequence[tuple[Method, MethodSize]]) -> list[dict[str, Any]]:
    """Return methods and sizes as plain values, ready for JSON."""
    return [
        {**asdict(size), "paper": method.paper, "about": method.about, "settings": list(method.lines)}
        for method, size in methods
    ]
