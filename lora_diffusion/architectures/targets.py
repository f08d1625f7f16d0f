"""Select the modules that get an adapter, by named sets such as `attention` and by patterns.

A pattern is a shell-style glob for the module path without its component, such as `mid_block.*` or `*.attn2.to_k`.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from lora_diffusion.errors import ConfigError

_Value = TypeVar("_Value")
_UNET_SETS: dict[str, tuple[str, ...]] = {
    "attention": ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0"),
    "cross-attention": ("*.attn2.to_q", "*.attn2.to_k", "*.attn2.to_v", "*.attn2.to_out.0"),
    "feed-forward": ("*.ff.net.0.proj", "*.ff.net.2"),
    "projections": ("*.proj_in", "*.proj_out"),
    "convolutions": ("*.conv1", "*.conv2", "*.conv_shortcut", "*.conv"),
    # B-LoRA [arXiv:2403.14572]: in SDXL, one of these two blocks learns the content and the other the style
    "b-lora-content": ("up_blocks.0.attentions.0.*.to_[qkv]", "up_blocks.0.attentions.0.*.to_out.0"),
    "b-lora-style": ("up_blocks.0.attentions.1.*.to_[qkv]", "up_blocks.0.attentions.1.*.to_out.0"),
    "all": ("*",),
}
_TEXT_ENCODER_SETS: dict[str, tuple[str, ...]] = {
    "attention": ("*.self_attn.*",),
    "feed-forward": ("*.mlp.*",),
    "all": ("*",),
}


def resolve_targets(paths: Sequence[str], *, unet: Iterable[str], text_encoders: Iterable[str]) -> tuple[str, ...]:
    """Select modules by named sets and patterns.

    Args:
        paths: Module paths to select from.
        unet: Names of sets, or patterns, for modules of the UNet.
        text_encoders: Names of sets, or patterns, for modules of all text encoders.

    Returns:
        The selected paths, in the order of `paths`.

    Raises:
        ConfigError: If there is no set or pattern, or one of them matches no module.
    """
    selected: set[str] = set()
    for target in unet:
        selected |= _match_target(paths, target, _UNET_SETS, in_unet=True)
    for target in text_encoders:
        selected |= _match_target(paths, target, _TEXT_ENCODER_SETS, in_unet=False)
    if not selected:
        raise ConfigError(
            "unet_target_modules and text_encoder_target_modules are both empty; name at least one, e.g. 'attention'"
        )
    return tuple(path for path in paths if path in selected)


def resolve_modules_to_save(paths: Sequence[str], patterns: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """Select the modules that are trained in full.

    Args:
        paths: Module paths to select from.
        patterns: Shell-style globs for whole paths, component included.
        targets: Modules that get an adapter layer and cannot be trained in full as well.

    Returns:
        The selected paths, in the order of `paths`.

    Raises:
        ConfigError: If a pattern matches no module, or a module that is among `targets`.
    """
    selected: set[str] = set()
    for pattern in patterns:
        matched = {path for path in paths if fnmatchcase(path, pattern)}
        if not matched:
            raise ConfigError(
                f"adapter.modules_to_save: {pattern!r} matches no module; expected a pattern for paths such as "
                f"{paths[0]!r}"
            )
        selected |= matched
    both = sorted(selected.intersection(targets))
    if both:
        raise ConfigError(
            f"{both[0]}: is matched by adapter.modules_to_save and by the target modules; remove it from one of them"
        )
    return tuple(path for path in paths if path in selected)


def resolve_patterns(
    paths: Sequence[str], patterns: Mapping[str, _Value], setting: str, default: _Value
) -> dict[str, _Value]:
    """Return a value for each module, as `rank_pattern` and `alpha_pattern` assign them.

    Args:
        paths: Module paths.
        patterns: Values by shell-style glob. A glob applies to the modules that it matches and to those inside them;
            the last one that applies decides.
        setting: Name of the setting, for the error message.
        default: Value of the modules to which no pattern applies.

    Raises:
        ConfigError: If a pattern matches no module.
    """
    values = dict.fromkeys(paths, default)
    for pattern, value in patterns.items():
        matched = [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")]
        if not matched:
            raise ConfigError(
                f"{setting}: {pattern!r} matches no trained module; expected a pattern for paths such as {paths[0]!r}"
            )
        values |= dict.fromkeys(matched, value)
    return values


def _match_target(paths: Sequence[str], target: str, sets: dict[str, tuple[str, ...]], *, in_unet: bool) -> set[str]:
    """Return the paths, of the UNet or of the text encoders, that a named set or a pattern matches."""
    patterns = sets.get(target, (target,))
    matched = {
        path
        for path in paths
        if path.startswith("unet.") == in_unet
        and any(fnmatchcase(path.split(".", 1)[1], pattern) for pattern in patterns)
    }
    if not matched:
        component = "UNet" if in_unet else "text encoder"
        example = next((p for p in paths if p.startswith("unet.") == in_unet), "none")
        raise ConfigError(
            f"target {target!r} matches no module of the {component}; expected one of {', '.join(sets)}, "
            f"or a pattern for paths such as {example.split('.', 1)[-1]!r}"
        )
    return matched
