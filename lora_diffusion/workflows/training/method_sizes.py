"""How large a method is on a base, by arithmetic from the shapes of its weights, and the listing of all methods."""

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
FILE_BYTES = 2
"""Of a number in a file, which is float16 unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class MethodSize:
    """Trained parameters and file size of a method."""

    method: str
    rank: int
    modules: int
    trained: int
    """Numbers that learn."""
    saved: int
    """Numbers in the file; for methods that take directions away what is left at the end."""
    share: float
    """Of the base's own numbers that are trained."""
    megabytes: float
    """Of the file."""


def count_numbers(config: AdapterConfig, shape: Shape, rank: int) -> tuple[int, int]:
    """Count trained and saved numbers of one module whose weight is (out, in[, kh, kw])."""
    out, inputs = shape[0], prod(shape[1:])
    pair = rank * (inputs + out)
    magnitude = out if config.use_dora else 0
    match config.kind:
        case "loha":
            return 2 * pair + magnitude, 2 * pair + magnitude
        case "lokr":
            numbers = count_kronecker_numbers(shape, rank, config.decompose_factor)
            return numbers + magnitude, numbers + magnitude
        case "vera":
            return rank + out, pair
        case "adalora":
            begun = round(rank * config.adalora_init_ratio)
            return begun * (inputs + out + 1), pair
        case "sparse":
            return pair + rank, round(pair * config.sparse_keep)
        case _:
            trained = rank * out if config.freeze_down else pair
            return trained + magnitude, pair * (2 if config.init_weights == "pissa" else 1) + magnitude


def count_kronecker_numbers(shape: Shape, rank: int, most: int) -> int:
    """Count the numbers of LoKr's small matrix and of its larger one, whole or low-rank, whichever is smaller."""
    small_out, small_in = (max(d for d in range(1, most + 1) if side % d == 0) for side in shape[:2])
    out, inputs = shape[0] // small_out, prod(shape[1:]) // small_in
    return small_out * small_in + min(rank * (out + inputs), out * inputs)


def measure_method(method: Method, base: str, rank: int | None = None) -> MethodSize:
    """Measure a method with the defaults of a style on a base. Raises BaseModelError, ConfigError."""
    checkpoint = find_checkpoint(base)
    table = with_method(default_settings("style", checkpoint.family.name), method)
    changes = {"rank": rank} if rank else {}
    config = validate(AdapterConfig, deep_merge(table["adapter"], changes), source=f"methods {method.name}")
    words = validate(TextualInversionConfig, table.get("textual_inversion", {}), source=f"methods {method.name}")
    return measure_config(method.name, base, config, words)


def measure_config(name: str, base: str, config: AdapterConfig, words: TextualInversionConfig) -> MethodSize:
    """Measure these settings on a base. Raises BaseModelError, ConfigError."""
    checkpoint = find_checkpoint(base)
    unet, text = config.unet_target_modules, config.text_encoder_target_modules
    paths = resolve_targets(trainable_paths(checkpoint.layout), unet=unet, text_encoders=text)
    full = resolve_modules_to_save(changeable_paths(checkpoint.layout), config.modules_to_save, paths)
    shapes: Mapping[str, Shape] = {name: tuple(stored.kind[1]) for name, stored in checkpoint.parameters.items()}
    vectors = sum(
        words.num_vectors
        * len(words.placeholder_tokens)
        * shapes[f"{component}.text_model.embeddings.token_embedding.weight"][1]
        for component in checkpoint.layout.text_layers
    )
    if words.placeholder_tokens and words.start_adapter_at == 1:
        paths, full = (), ()
    ranks = resolve_patterns(paths, config.rank_pattern, "adapter.rank_pattern", config.rank)
    sizes = [count_numbers(config, shapes[f"{path}.weight"], ranks[path]) for path in paths]
    whole = sum(prod(shapes.get(f"{path}.{part}", (0,))) for path in full for part in ("weight", "bias"))
    trained, saved = (sum(size[side] for size in sizes) + whole + vectors for side in (0, 1))
    total = sum(map(prod, shapes.values()))
    magnitudes = (
        sum(shapes[f"{path}.weight"][0] for path in paths) if config.use_dora else 0
    )  # float32, of twice the bytes
    return MethodSize(
        method=name,
        rank=config.rank,
        modules=len(paths) + len(full),
        trained=trained,
        saved=saved,
        share=trained / total,
        megabytes=(saved + magnitudes) * FILE_BYTES / 1e6,
    )


def list_methods(base: str, rank: int | None, names: Sequence[str]) -> list[tuple[Method, MethodSize]]:
    """Return the methods with these names, or all, with their sizes."""
    return [(each, measure_method(each, base, rank)) for each in METHODS if not names or each.name in names]


def format_methods(found: Sequence[tuple[Method, MethodSize]], base: str) -> str:
    """Format the list for the terminal."""
    rows = [
        [
            method.name,
            str(size.rank),
            f"{size.trained:,}",
            f"{size.share:.2%}",
            f"{size.megabytes:.2f}",
            " ".join(f"--set '{line}'" for line in method.lines) or "(the default)",
        ]
        for method, size in found
    ]
    table = format_table(["method", "rank", "trained", "of the base", "file, MB", "settings"], rows, left=(0, -1))
    wrap = textwrap.TextWrapper(width=100, initial_indent="  ", subsequent_indent="  ")
    about = [f"{method.name} [{format_source(method)}]\n{wrap.fill(method.about)}" for method, _ in found]
    return "\n".join([f"Sizes on {base}, with the default settings for a style:", table, "", *about])


def format_source(method: Method) -> str:
    return f"arXiv:{method.paper}"


def to_json(found: Sequence[tuple[Method, MethodSize]]) -> list[dict[str, Any]]:
    """Return the list as plain values, ready for JSON."""
    return [
        {**asdict(size), "paper": method.paper, "about": method.about, "settings": list(method.lines)}
        for method, size in found
    ]
