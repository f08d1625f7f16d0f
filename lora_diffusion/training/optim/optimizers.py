"""Make optimizers by name or import path, with one parameter group per learning rate."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lora_diffusion.config.optimizer import OptimizerConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.training.optim.lr_groups import TEXT_ENCODER_SHARE, resolve_peak_rates

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # arXiv:1711.05101; fused, because otherwise hundreds of small factors would cost a dozen kernel launches each
    "adamw": ("torch.optim.AdamW", {"fused": True}),
    "adamw-8bit": ("bitsandbytes.optim.AdamW8bit", {}),  # arXiv:2110.02861
    "paged-adamw-8bit": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    # arXiv:2306.06101; the options are those that the authors recommend for diffusion models and for warmup
    "prodigy": ("pytorch_optimizer.Prodigy", {"bias_correction": True, "safeguard_warmup": True}),
    # arXiv:1804.04235; torch's Adafactor scales steps by the norm of the parameter, but LoRA's `up` starts at zero
    "adafactor": ("transformers.optimization.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "lion": ("pytorch_optimizer.Lion", {}),  # arXiv:2302.06675
    "schedule-free": ("pytorch_optimizer.ScheduleFreeAdamW", {}),  # arXiv:2405.15682
}
"""Import path and default options by value of `optimizer.kind`."""
_DEDICATED_SETTINGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Arguments of optimizer classes with their own setting; they are not allowed in `optimizer.options`."""


def adam_settings(learning_rate: float, max_gradient_norm: float = sys.float_info.max) -> OptimizerConfig:
    """Return the settings of Adam without weight decay, with a cosine schedule without warmup.

    Args:
        learning_rate: Learning rate of the first step.
        max_gradient_norm: Gradients are clipped to this norm; by default never.
    """
    return OptimizerConfig(
        kind="torch.optim.Adam",
        learning_rate=learning_rate,
        weight_decay=0,
        schedule="cosine",
        warmup_steps=0,
        max_gradient_norm=max_gradient_norm,
    )


def new_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, text_encoders: Sequence[str]
) -> torch.optim.Optimizer:
    """Make an optimizer with one parameter group for each learning rate, in training mode.

    Parameters with rate 0 (see `find_frozen`) are left out, and their `requires_grad` is set to False.

    Args:
        parameters: Parameters by name, which starts with the component, as in `resolve_peak_rates`.
        config: Optimizer, options and learning rates.
        text_encoders: All text encoders of the base, in order.

    Raises:
        ConfigError: The optimizer class cannot be imported or does not support the device, it rejects an option or the
            weight decay, it supports one learning rate only, all parameters are frozen, or `resolve_peak_rates` raises.
    """
    optimizer_class = _resolve_class(config.kind)
    options = _resolve_options(optimizer_class, config)
    rates = resolve_peak_rates(
        parameters, config, text_encoders, share=1.0 if _is_self_tuning(optimizer_class) else TEXT_ENCODER_SHARE
    )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        parameter.requires_grad_(rates[name] > 0)
        if rates[name] > 0:
            groups.setdefault(rates[name], []).append(parameter)
    if not groups:
        raise ConfigError("optimizer.rates freezes all trained parameters; remove a pattern whose factor is 0")
    if _is_self_tuning(optimizer_class) and len(groups) > 1:
        raise ConfigError(
            f"optimizer.kind {config.kind!r} finds one learning rate for all parameters, but the settings give "
            f"{len(groups)}; remove text_encoder_learning_rate and all rates except those of 0"
        )
    _check_device(optimizer_class, config.kind, next(iter(groups.values()))[0].device)
    try:
        optimizer = optimizer_class([{"params": group, "lr": rate} for rate, group in groups.items()], **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"optimizer.options: {optimizer_class.__name__} rejects {options}: {error}") from None
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


@contextmanager
def evaluation_mode(optimizer: Any) -> Generator[None]:
    """Switch the parameters to the values to evaluate and save inside the context, and restore them afterwards.

    Schedule-free optimizers compute gradients at y, but the model to evaluate is their average x; other optimizers are
    left alone. Converting x back to y rounds, so a copy of y is restored: validation does not change the run.

    Args:
        optimizer: An optimizer, or Accelerate's wrapper around one.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(inner, "eval"):
        yield
        return
    parameters = [p for group in inner.param_groups for p in group["params"]]
    training_values = [p.detach().clone() for p in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for p, value in zip(parameters, training_values, strict=True):
                p.copy_(value)


def _resolve_class(kind: str) -> type[Any]:
    """Import the class of a name in KINDS, `module.Class` or `module:Class`. Raises ConfigError if there is none."""
    path = KINDS[kind][0] if kind in KINDS else kind.replace(":", ".")
    module, _, name = path.rpartition(".")
    if not module:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(KINDS)}, or an import path"
        raise ConfigError(f"optimizer.kind is {kind!r}, which is not known; {hint}")
    try:  # by name, as users may give any class; import-linter's contract names transformers' Adafactor in a comment
        resolved = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        hint = (
            f"pip install {module.partition('.')[0]}" if kind in KINDS else "check its spelling, or install the package"
        )
        raise ConfigError(
            f"optimizer.kind {kind!r} needs {module}, which cannot be imported ({error}); {hint}"
        ) from None
    if not (isinstance(resolved, type) and issubclass(resolved, torch.optim.Optimizer)):
        raise ConfigError(
            f"optimizer.kind {kind!r}: {module} has no optimizer {name!r}; expected the name of a subclass of "
            "torch.optim.Optimizer"
        )
    return resolved


def _resolve_options(optimizer_class: type[Any], config: OptimizerConfig) -> dict[str, Any]:
    """Return the arguments of a class besides parameters and learning rate. Raises ConfigError for an unknown one."""
    signature = inspect.signature(optimizer_class).parameters.values()
    known = [p.name for p in signature if p.name != "params" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    allowed = [name for name in known if name not in _DEDICATED_SETTINGS]
    for name in config.options:
        if name in _DEDICATED_SETTINGS:
            raise ConfigError(f"optimizer.options contains {name!r}; set optimizer.{_DEDICATED_SETTINGS[name]} instead")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(allowed)}"
            raise ConfigError(f"optimizer.options: {optimizer_class.__name__} has no option {name!r}; {hint}")
    if config.weight_decay and "weight_decay" not in known:
        raise ConfigError(
            f"optimizer.kind: {optimizer_class.__name__} has no weight decay; set optimizer.weight_decay to 0"
        )
    decay = {"weight_decay": config.weight_decay} if "weight_decay" in known else {}
    # TOML has lists only, but some classes require tuples
    options = {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for name, value in config.options.items()
    }
    return {**decay, **KINDS.get(config.kind, ("", {}))[1], **options}


def _is_self_tuning(optimizer_class: type[Any]) -> bool:
    """Return whether a class estimates one step size for all parameters, which it multiplies by `lr`."""
    return optimizer_class.__name__.startswith(("Prodigy", "DAdapt"))


def _check_device(optimizer_class: type[Any], name: str, device: torch.device) -> None:
    """Raise ConfigError if an optimizer of bitsandbytes, which supports some devices only, fails on this one."""
    if not optimizer_class.__module__.startswith("bitsandbytes."):
        return
    if "Paged" in optimizer_class.__name__ and device.type == "cpu":
        raise ConfigError(f"optimizer.kind {name!r} pages its state from GPU memory and needs a GPU; use 'adamw-8bit'")
    trial = nn.Parameter(torch.ones(64, 64, device=device))  # bitsandbytes keeps the state of smaller ones in 32 bits
    trial.grad = torch.ones_like(trial)
    try:
        optimizer_class([trial]).step()
    except (RuntimeError, AttributeError, OSError) as error:
        raise ConfigError(f"optimizer.kind {name!r} does not support {device.type}: {error}; use 'adamw'") from None
