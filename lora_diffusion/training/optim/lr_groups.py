"""The peak learning rate of each parameter: by component, then by pattern."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_diffusion.config.train import OptimizerConfig
from lora_diffusion.errors import ConfigError

TEXT_ENCODER_SHARE = 0.1
"""Text encoders learn at a tenth of the UNet's rate if nothing else is said: they forget faster."""


def resolve_peak_rates(
    names: Iterable[str], config: OptimizerConfig, text_encoders: Sequence[str], *, share: float = TEXT_ENCODER_SHARE
) -> dict[str, float]:
    """The peak rate of each parameter; 0 for one that a pattern freezes.

    Names begin with their component, as in `unet.mid_block.attentions.0.proj_in.down`. `text_encoders` are all that the
    base has, in order; without a rate of their own they get `share` of the UNet's. Raises ConfigError for a pattern
    that matches nothing, for too few or too many rates, and for a rate of text encoders that are not trained.
    """
    names = tuple(names)
    by_component = resolve_component_rates(config, text_encoders, share)
    if config.text_encoder_learning_rate is not None and all(name.startswith("unet.") for name in names):
        raise ConfigError(
            "optimizer.text_encoder_learning_rate is set, but no text encoder is trained; name modules in "
            "adapter.text_encoder_targets, or leave the rate out"
        )
    if config.up_rate != 1 and not any(name.endswith(".up") for name in names):
        raise ConfigError(
            "optimizer.up_rate is the rate of second factors, and nothing that is trained here has one; set it to 1"
        )
    factors = resolve_rate_factors(names, {**config.rates, **({"*.up": config.up_rate} if config.up_rate != 1 else {})})
    own = {
        name: config.word_learning_rate if ".words." in name else by_component[name.partition(".")[0]] for name in names
    }
    return {name: own[name] * factors[name] for name in names}


def find_frozen(names: Iterable[str], config: OptimizerConfig) -> tuple[str, ...]:
    """The parameters that a factor of 0 freezes. Raises ConfigError for a pattern that matches nothing."""
    return tuple(name for name, factor in resolve_rate_factors(tuple(names), config.rates).items() if factor == 0)


def resolve_component_rates(config: OptimizerConfig, text_encoders: Sequence[str], share: float) -> dict[str, float]:
    """The peak rate of each component. Raises ConfigError unless there is one rate, or one for each encoder."""
    given = config.text_encoder_learning_rate
    if isinstance(given, tuple) and len(given) != len(text_encoders):
        raise ConfigError(
            f"optimizer.text_encoder_learning_rate has {len(given)} values; give one for all, or "
            f"{len(text_encoders)}, one for each of {', '.join(text_encoders)}"
        )
    default = config.learning_rate * share if given is None else given
    each = default if isinstance(default, tuple) else (default,) * len(text_encoders)
    return {"unet": config.learning_rate, **dict(zip(text_encoders, each, strict=True))}


def resolve_rate_factors(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """The product of the factors of all patterns that match a parameter.

    A pattern is a glob over the whole path with its component; it may name a parameter (`*.up`), a module (`*.to_q`)
    or all that lies below one (`unet.down_blocks.0`). Raises ConfigError for one that matches nothing.
    """
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in rates.items():
        matched = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matched:
            raise ConfigError(f"optimizer.rates: {pattern!r} matches no trained module; {suggest_path(pattern, names)}")
        for name in matched:
            factors[name] *= factor
    return factors


def suggest_path(pattern: str, names: Sequence[str]) -> str:
    """A hint: the path, or the end of one, that a pattern is most like."""
    parts = [name.split(".") for name in names]
    paths = {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)}
    ends = {f"*.{'.'.join(path[start:])}" for path in parts for start in range(max(1, len(path) - 2), len(path))}
    modules = {f"*.{path[-2]}" for path in parts if len(path) > 1}
    near = difflib.get_close_matches(pattern.removesuffix(".*"), sorted(paths | ends | modules), n=1, cutoff=0)
    return f"did you mean {near[0]!r}?" if near else "nothing is trained"
