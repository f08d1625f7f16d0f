"""Which modules get an adapter: named sets and patterns, resolved against a family's module paths.

A pattern is a shell-style glob over the path without its component, such as `mid_block.*` or `*.attn2.to_k`.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from lora_diffusion.errors import ConfigError

Value = TypeVar("Value")
UNET_SETS: dict[str, tuple[str, ...]] = {
    "attention": ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0"),
    "cross-attention": ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0"),
    "feed-forward": ("*.ff.net.0.proj", "*.ff.net.2"),
    "projections": ("*.proj_in", "*.proj_out"),
    "convolutions": ("*.conv1", "*.conv2", "*.conv_shortcut", "*.conv"),
    # B-LoRA [arXiv 2403.14572]: in SDXL one of these two learns what is shown, the other how
    "b-lora-content": ("up_blocks.0.attentions.0.*.to_[qkv]", "up_blocks.0.attentions.0.*.to_out.0"),
    "b-lora-style": ("up_blocks.0.attentions.1.*.to_[qkv]", "up_blocks.0.attentions.1.*.to_out.0"),
    "all": ("*",),
}
TEXT_ENCODER_SETS: dict[str, tuple[str, ...]] = {
    "attention": ("*.self_attn.*",),
    "feed-forward": ("*.mlp.*",),
    "all": ("*",),
}


def resolve_targets(paths: Sequence[str], *, unet: Iterable[str], text_encoders: Iterable[str]) -> tuple[str, ...]:
    """The module paths that the sets and patterns name, in the order of `paths`.

    Raises ConfigError if any single set or pattern names no module.
    """
    wanted: set[str] = set()
    for target in unet:
        wanted |= is_match(paths, target, UNET_SETS, unet_part=True)
    for target in text_encoders:
        wanted |= is_match(paths, target, TEXT_ENCODER_SETS, unet_part=False)
    if not wanted:
        raise ConfigError(
            "unet_target_modules and text_encoder_target_modules are both empty; name at least one, e.g. 'attention'"
        )
    return tuple(path for path in paths if path in wanted)


def resolve_modules_to_save(paths: Sequence[str], patterns: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of modules that are trained in full; patterns match whole paths with their component.

    Raises ConfigError for a pattern that names no module, or one that is trained by factors already.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        found = {path for path in paths if fnmatchcase(path, pattern)}
        if not found:
            raise ConfigError(
                f"adapter.modules_to_save: {pattern!r} names no module; expected a pattern over paths like {paths[0]!r}"
            )
        wanted |= found
    both = sorted(wanted.intersection(taken))
    if both:
        raise ConfigError(
            f"{both[0]} is named by adapter.modules_to_save and by the other targets; a module is trained one way"
        )
    return tuple(path for path in paths if path in wanted)


def resolve_patterns(
    paths: Sequence[str], patterns: Mapping[str, Value], what: str, default: Value
) -> dict[str, Value]:
    """Return a value for each path: that of the last pattern that matches it or one of its parents.

    Raises ConfigError, naming the setting `what`, for a pattern that matches none.
    """
    found = dict.fromkeys(paths, default)
    for pattern, value in patterns.items():
        matched = [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")]
        if not matched:
            raise ConfigError(f"{what}: {pattern!r} matches no trained module, such as {paths[0]!r}")
        found |= dict.fromkeys(matched, value)
    return found


def is_match(paths: Sequence[str], target: str, sets: dict[str, tuple[str, ...]], *, unet_part: bool) -> set[str]:
    patterns = sets.get(target, (target,))
    found = {
        path
        for path in paths
        if path.startswith("unet.") == unet_part
        and any(fnmatchcase(path.split(".", 1)[1], pattern) for pattern in patterns)
    }
    if not found:
        part = "UNet" if unet_part else "text encoder"
        example = next((p for p in paths if p.startswith("unet.") == unet_part), "none")
        raise ConfigError(
            f"target {target!r} names no module of the {part}; expected one of {', '.join(sets)} "
            f"or a pattern over paths like {example.split('.', 1)[-1]!r}"
        )
    return found
