"""Peak learning rate of each parameter, from the rate of its component and the factors of matching patterns."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_diffusion.config.train import OptimizerConfig
from lora_diffusion.errors import ConfigError

TEXT_ENCODER_SHARE = 0.1
"""Default learning rate of text encoders relative to the UNet's; they forget faster, so it is lower."""


def resolve_peak_rates(
    names: Iterable[str], config: OptimizerConfig, text_encoders: Sequence[str], *, share: float = TEXT_ENCODER_SHARE
) -> dict[str, float]:
    """Compute the peak learning rate of each parameter.

    Args:
        names: Names of the parameters, which start with their component, such as
            `unet.mid_block.attentions.0.proj_in.down`.
        config: The learning rates, the factors by pattern (`rates`) and the factor of `up` (LoRA+,
            `loraplus_lr_ratio`).
        text_encoders: All text encoders of the base, in order.
        share: Rate of the text encoders relative to the UNet's, if they have none of their own.

    Returns:
        Learning rates by name; 0 for parameters that a pattern freezes.

    Raises:
        ConfigError: A pattern matches no parameter, the number of text encoder rates is wrong, a text encoder rate is
            set although no text encoder is trained, or `loraplus_lr_ratio` is set although no layer has a factor `up`.
    """
    names = tuple(names)
    by_component = _resolve_component_rates(config, text_encoders, share)
    if config.text_encoder_learning_rate is not None and all(name.startswith("unet.") for name in names):
        raise ConfigError(
            "optimizer.text_encoder_learning_rate is set, but no text encoder is trained; set "
            "adapter.text_encoder_target_modules, or remove the rate"
        )
    if config.loraplus_lr_ratio != 1 and not any(name.endswith(".up") for name in names):
        raise ConfigError(
            f"optimizer.loraplus_lr_ratio is {config.loraplus_lr_ratio}, but no trained layer has a factor `up`; "
            "set it to 1, or adapter.kind to lora"
        )
    factors = _resolve_rate_factors(
        names, {**config.rates, **({"*.up": config.loraplus_lr_ratio} if config.loraplus_lr_ratio != 1 else {})}
    )
    rates = {
        name: config.embedding_learning_rate if ".tokens." in name else by_component[name.partition(".")[0]]
        for name in names
    }
    return {name: rates[name] * factors[name] for name in names}


def find_frozen(names: Iterable[str], config: OptimizerConfig) -> tuple[str, ...]:
    """List the parameters that a pattern in `config.rates` freezes with a factor of 0.

    Raises:
        ConfigError: A pattern matches no parameter.
    """
    return tuple(name for name, factor in _resolve_rate_factors(tuple(names), config.rates).items() if factor == 0)


def _resolve_component_rates(config: OptimizerConfig, text_encoders: Sequence[str], share: float) -> dict[str, float]:
    """Compute the peak rate of each component. Raises ConfigError for a wrong number of text encoder rates."""
    given = config.text_encoder_learning_rate
    if isinstance(given, tuple) and len(given) != len(text_encoders):
        raise ConfigError(
            f"optimizer.text_encoder_learning_rate has {len(given)} values; expected one value for all text encoders, "
            f"or {len(text_encoders)} values, for {', '.join(text_encoders)}"
        )
    default = config.learning_rate * share if given is None else given
    each = default if isinstance(default, tuple) else (default,) * len(text_encoders)
    return {"unet": config.learning_rate, **dict(zip(text_encoders, each, strict=True))}


def _resolve_rate_factors(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Compute for each parameter the product of the factors of all patterns that match it.

    A pattern is a glob over the whole path with its component; it may match a parameter (`*.up`), a module (`*.to_q`)
    or a parent of modules (`unet.down_blocks.0`). Raises ConfigError for a pattern that matches nothing.
    """
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in rates.items():
        matched = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matched:
            raise ConfigError(
                f"optimizer.rates: {pattern!r} matches no trained module; {_suggest_path(pattern, names)}"
            )
        for name in matched:
            factors[name] *= factor
    return factors


def _suggest_path(pattern: str, names: Sequence[str]) -> str:
    """Return a hint with the path, or the end of a path, that is most similar to a pattern."""
    parts = [name.split(".") for name in names]
    paths = {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)}
    ends = {f"*.{'.'.join(path[start:])}" for path in parts for start in range(max(1, len(path) - 2), len(path))}
    modules = {f"*.{path[-2]}" for path in parts if len(path) > 1}
    near = difflib.get_close_matches(pattern.removesuffix(".*"), sorted(paths | ends | modules), n=1, cutoff=0)
    return f"did you mean {near[0]!r}?" if near else "nothing is trained"
