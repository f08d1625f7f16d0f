"""The settings of a run of which only data and purpose are told: those that suit the base's family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.config.adapter import SETTINGS_OF_FILE
from lora_diffusion.config.defaults import Purpose, default_settings, memory_settings, with_precision
from lora_diffusion.config.optimizer import KIND_DEFAULTS
from lora_diffusion.config.settings import deep_merge, validate
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.checkpoints.diffusers import read_layout
from lora_diffusion.models.load import default_device
from lora_diffusion.models.locate import find_base


def make_settings(
    purpose: Purpose,
    told: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    base: str,
    gigabytes: int | None = None,
) -> TrainConfig:
    """A run's settings: the family's defaults, what is told over them, and `changes` over both.

    `gigabytes` are those of the GPU, 8, 12 or 24; without, nothing is done for the sake of memory but for SDXL.

    Raises BaseModelError, and ConfigError with all mistakes at once.
    """
    family, _ = read_layout(find_base(base))
    table = with_precision(default_settings(purpose, family.name), on_gpu=default_device().type != "cpu")
    if gigabytes is not None:
        table = deep_merge(table, memory_settings(family.name, gigabytes))
    said = deep_merge(told, changes or {})
    table = deep_merge({**drop_overridden_defaults(table, said), "base": base}, said)
    config = validate(TrainConfig, table, source=f"train {purpose}")
    if "text_encoder_learning_rate" in said.get("optimizer", {}) or config.adapter.trains_text_encoder:
        return config
    optimizer = config.optimizer.model_copy(update={"text_encoder_learning_rate": None})  # of nothing that is trained
    return config.model_copy(update={"optimizer": optimizer})


def drop_overridden_defaults(table: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The family's defaults less those that do not go with what is said: what an optimizer finds or has of its own,
    what a file to go on from brings, and the pull that a slider has anyway."""
    gives_way: dict[str, set[str]] = {}
    if "learning_rate" in KIND_DEFAULTS.get(said.get("optimizer", {}).get("kind", ""), {}):
        gives_way["optimizer"] = {"learning_rate", "text_encoder_learning_rate"}
    if "begin_with" in said.get("adapter", {}):
        gives_way["adapter"] = {*SETTINGS_OF_FILE}
    if said.get("slider"):
        gives_way["prior"] = {"mode", "weight"}
    kept = {
        section: {name: value for name, value in table.get(section, {}).items() if name not in names}
        for section, names in gives_way.items()
    }
    return {**table, **kept}


def subject_settings(data: Path, output: Path, *, instance: str, class_prompt: str) -> dict[str, Any]:
    """What is told of a subject: `photo of sks dog`, of the class `photo of a dog`.

    Raises ConfigError without an instance prompt.
    """
    if not instance.strip():
        raise ConfigError("a subject needs a prompt with a word of its own: --instance 'photo of sks dog'")
    prior = {"prior": {"prompt": class_prompt}} if class_prompt else {}
    return {"data": {"folder": data, "instance_prompt": instance}, "output": output, **prior}
