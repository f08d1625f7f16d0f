"""Optimizers by name or import path, for parameters with rates of their own."""

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_diffusion.config.train import OptimizerConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.optim.lr_groups import TEXT_ENCODER_SHARE, resolve_peak_rates

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # arXiv 1711.05101; fused, as hundreds of small factors would else cost a dozen calls each
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "adamw-8bit": ("bitsandbytes.optim.AdamW8bit", {}),  # arXiv 2110.02861
    "paged-adamw-8bit": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    # arXiv 2306.06101; the options are those that its authors give for diffusion models and warm-up
    "prodigy": ("pytorch_optimizer.Prodigy", {"bias_correction": True, "safeguard_warmup": True}),
    # arXiv 1804.04235; torch's own takes steps relative to a parameter's size, and LoRA's `up` starts at zero
    "adafactor": ("transformers.optimization.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "lion": ("pytorch_optimizer.Lion", {}),  # arXiv 2302.06675
    "schedule-free": ("pytorch_optimizer.ScheduleFreeAdamW", {}),  # arXiv 2405.15682
}
"""Import path and options of each name."""
OWN_SETTINGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Arguments that have settings of their own."""


def new_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, text_encoders: Sequence[str]
) -> torch.optim.Optimizer:
    """An optimizer of named parameters, one group for each rate, ready for training.

    Names and `text_encoders` are those of `resolve_peak_rates`. Parameters of rate 0 are left out and need no gradient
    (`find_frozen`). Raises ConfigError for a class that is not there or does not run here, options that it does
    not know or does not like, rates that it cannot keep, and all that `resolve_peak_rates` refuses.
    """
    kind = optimizer_class(config.kind)
    options = resolve_options(kind, config)
    rates = resolve_peak_rates(
        parameters, config, text_encoders, share=1.0 if is_self_tuning(kind) else TEXT_ENCODER_SHARE
    )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parameter.requires_grad_(rates[name] > 0)
        if rates[name] > 0:
            groups.setdefault(rates[name], []).append(parameter)
    if not groups:
        raise ConfigError("optimizer.rates freezes everything that could be trained; leave something out")
    if is_self_tuning(kind) and len(groups) > 1:
        raise ConfigError(
            f"optimizer.kind {config.kind!r} finds one rate for all parameters, but there are {len(groups)}; leave out "
            "text_encoder_learning_rate and all rates but those of 0"
        )
    check_runs_on_device(kind, config.kind, next(iter(groups.values()))[0].device)
    try:
        optimizer = kind([{"params": group, "lr": rate} for rate, group in groups.items()], **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"optimizer.options: {kind.__name__} refuses {options}: {error}") from None
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


@contextmanager
def evaluation_mode(optimizer: Any) -> Iterator[None]:
    """The parameters that should be used and saved, while inside; afterwards those that training goes on with.

    Schedule-free optimizers take gradients at y and mean x to be used; others have one set, and nothing happens. Going
    from x back to y rounds, so y is copied: a validation changes no bit of the run. Takes Accelerate's wrapper too.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(inner, "eval"):
        yield
        return
    parameters = [p for group in inner.param_groups for p in group["params"]]
    own = [p.detach().clone() for p in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for p, value in zip(parameters, own, strict=True):
                p.copy_(value)


def optimizer_class(kind: str) -> type[Any]:
    """The class of a name in KINDS, of `module.Class` or of `module:Class`. Raises ConfigError if there is none."""
    path = KINDS[kind][0] if kind in KINDS else kind.replace(":", ".")
    module, _, name = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(KINDS)}, or module.Class"
        raise ConfigError(f"optimizer.kind is {kind!r}; {hint}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        hint = f"pip install {module.partition('.')[0]}" if kind in KINDS else "check its spelling, or install it"
        raise ConfigError(
            f"optimizer.kind {kind!r} needs {module}, which cannot be imported ({error}); {hint}"
        ) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer.kind {kind!r}: {module} has no optimizer {name!r}; give the class's own name")
    return found


def resolve_options(kind: type[Any], config: OptimizerConfig) -> dict[str, Any]:
    """Arguments for a class besides parameters and rate. Raises ConfigError for one that its signature lacks."""
    takes = inspect.signature(kind).parameters.values()
    known = [p.name for p in takes if p.name != "params" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    free = [name for name in known if name not in OWN_SETTINGS]
    for name in config.options:
        if name in OWN_SETTINGS:
            raise ConfigError(f"optimizer.options has {name!r}; set optimizer.{OWN_SETTINGS[name]} instead")
        if name not in free:
            near = difflib.get_close_matches(name, free, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(free)}"
            raise ConfigError(f"optimizer.options: {kind.__name__} has no option {name!r}; {hint}")
    if config.weight_decay and "weight_decay" not in known:
        raise ConfigError(f"optimizer.kind: {kind.__name__} has no weight decay; set optimizer.weight_decay to 0")
    decay = {"weight_decay": config.weight_decay} if "weight_decay" in known else {}
    # TOML has lists only, and some classes ask for tuples
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in config.options.items()}
    return {**decay, **KINDS.get(config.kind, ("", {}))[1], **given}


def is_self_tuning(kind: type[Any]) -> bool:
    """Whether a class estimates one step size for all parameters, of which `lr` is a factor."""
    return kind.__name__.startswith(("Prodigy", "DAdapt"))


def check_runs_on_device(kind: type[Any], name: str, device: torch.device) -> None:
    """Raises ConfigError if bitsandbytes, which is built for some devices only, cannot take a step on this one."""
    if not kind.__module__.startswith("bitsandbytes."):
        return
    if "Paged" in kind.__name__ and device.type == "cpu":
        raise ConfigError(f"optimizer.kind {name!r} pages a GPU's memory, and there is none; use 'adamw-8bit'")
    trial = nn.Parameter(torch.ones(64, 64, device=device))  # smaller ones are not kept in 8 bits
    trial.grad = torch.ones_like(trial)
    try:
        kind([trial]).step()
    except (RuntimeError, AttributeError, OSError) as error:
        raise ConfigError(f"optimizer.kind {name!r} does not run on {device.type}: {error}; use 'adamw'") from None
