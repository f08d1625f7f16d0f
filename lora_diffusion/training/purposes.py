"""The settings of a run of which only data and purpose are told: those that suit the base's family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.config import changed, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.diffusers_folder import anatomy_of_folder
from lora_diffusion.models import default_device, find_base
from lora_diffusion.train_config import TrainConfig
from lora_diffusion.train_defaults import Purpose, default_settings, memory_settings, with_precision


def settings_for(
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
    family, _ = anatomy_of_folder(find_base(base))
    table = with_precision(default_settings(purpose, family.name), on_gpu=default_device().type != "cpu")
    if gigabytes is not None:
        table = changed(table, memory_settings(family.name, gigabytes))
    table = changed(changed({**table, "base": base}, told), changes or {})
    config = validate(TrainConfig, table, source=f"train {purpose}")
    said = any("text_encoder_learning_rate" in each.get("optimiser", {}) for each in (told, changes or {}))
    if said or config.adapter.text_learns:
        return config
    optimiser = config.optimiser.model_copy(update={"text_encoder_learning_rate": None})  # of nothing that is trained
    return config.model_copy(update={"optimiser": optimiser})


def subject(data: Path, output: Path, *, instance: str, class_prompt: str) -> dict[str, Any]:
    """What is told of a subject: `photo of sks dog`, of the class `photo of a dog`.

    Raises ConfigError without an instance prompt.
    """
    if not instance.strip():
        raise ConfigError("a subject needs a prompt with a word of its own: --instance 'photo of sks dog'")
    prior = {"prior": {"prompt": class_prompt}} if class_prompt else {}
    return {"data": {"folder": data, "instance_prompt": instance}, "output": output, **prior}
