"""Runs of a few steps: on the random base, and on the embedded one, where something is learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.config.settings import deep_merge, validate
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from lora_diffusion.training.validation import run_validation

TABLE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "trigger_words": ["sks"],
    "adapter": {
        "rank": 2,
        "alpha": 3.0,
        "unet_target_modules": ["attention"],
        "text_encoder_target_modules": ["attention"],
    },
    "optimizer": {"learning_rate": 1e-2, "text_encoder_learning_rate": 1e-2, "warmup_steps": 1},
}
UNET_ONLY: dict[str, Any] = {
    "adapter": {"alpha": None, "text_encoder_target_modules": []},
    "optimizer": {"text_encoder_learning_rate": None},
}
"""Changes to these settings for what trains no text encoder."""


def settings(pictures: Path, base: Path, changes: Mapping[str, Any] | None = None, **top: object) -> TrainConfig:
    """Six steps on a random base, every part of the adapter trained."""
    output = pictures.parent / "out" / "style.safetensors"
    table = {"data": {"folder": pictures}, "output": output, "base": str(base), **TABLE}
    return TrainConfig.model_validate(deep_merge({**table, **top}, changes or {}))


def short_run(pictures: Path, output: Path, steps: int, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """So many steps on the embedded base at a high rate, validated on the same pictures at the end."""
    table = {
        "data": {"folder": pictures},
        "output": output,
        "steps": steps,
        "batch_size": 2,
        "adapter": {"rank": 4},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1, "schedule": "constant"},
        "validation": {"folder": pictures, "every": steps, "draws": 4},
        "tracking": {"trackers": []},
    }
    return validate(TrainConfig, deep_merge(table, changes or {}), source="test")


def interrupted(config: TrainConfig) -> None:
    """A run that Ctrl-C ends as it makes its first samples after a step."""

    def stop(_run: Any, step: int) -> None:
        if step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)


def loss_before(config: TrainConfig) -> float:
    """What validation says before the first step."""
    run = set_up(config)
    assert run.held_out
    return run_validation(run.denoiser, run.captions, run.held_out, config).loss
