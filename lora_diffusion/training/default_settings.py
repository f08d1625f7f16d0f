"""Complete training settings from a few: defaults for the purpose and the base's family, and the user's changes."""

import os
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
    settings: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    base: str,
    gigabytes: int | None = None,
) -> TrainConfig:
    """Make the settings of a training run.

    Args:
        purpose: What is trained, `style` or `dreambooth`; selects the defaults.
        settings: Settings by section, at least `data` and `output`; they override the defaults.
        changes: Further settings by section; they override both.
        base: Base to train on: `tiny-sd`, a folder in diffusers' layout, or a hub id.
        gigabytes: Memory of the GPU, 8, 12 or 24, to add memory-saving settings for. By default the family's settings
            are not changed.

    Raises:
        BaseModelError: If the base cannot be found or read.
        ConfigError: If settings are invalid; the message lists all mistakes.
    """
    family, _ = read_layout(find_base(base))
    defaults = with_precision(default_settings(purpose, family.name), on_gpu=default_device().type != "cpu")
    if gigabytes is not None:
        defaults = deep_merge(defaults, memory_settings(family.name, gigabytes))
    given = deep_merge(settings, changes or {})
    table = deep_merge({**_drop_overridden_defaults(defaults, given), "base": base}, given)
    config = validate(TrainConfig, table, source=f"train {purpose}")
    if "text_encoder_learning_rate" in given.get("optimizer", {}) or config.adapter.trains_text_encoder:
        return config
    # The default learning rate of text encoders would be an error where no text encoder is trained.
    optimizer = config.optimizer.model_copy(update={"text_encoder_learning_rate": None})
    return config.model_copy(update={"optimizer": optimizer})


def _drop_overridden_defaults(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the defaults that conflict with settings the user has given.

    These are learning rates if the optimizer has its own default or finds one, adapter settings that come from the
    adapter file to continue from, and prior preservation for concept sliders.
    """
    conflicts: dict[str, set[str]] = {}
    if "learning_rate" in KIND_DEFAULTS.get(given.get("optimizer", {}).get("kind", ""), {}):
        conflicts["optimizer"] = {"learning_rate", "text_encoder_learning_rate"}
    if "init_from" in given.get("adapter", {}):
        conflicts["adapter"] = {*SETTINGS_OF_FILE}
    if given.get("slider"):
        conflicts["prior"] = {"mode", "weight"}
    sections = {
        section: {name: value for name, value in defaults.get(section, {}).items() if name not in names}
        for section, names in conflicts.items()
    }
    return {**defaults, **sections}


def subject_settings(
    data: str | os.PathLike[str], output: str | os.PathLike[str], *, instance: str, class_prompt: str
) -> dict[str, Any]:
    """Make the settings that are specific to a subject (DreamBooth).

    Args:
        data: Folder of images.
        output: The adapter file to write.
        instance: Prompt that names the subject, such as `photo of sks dog`.
        class_prompt: Prompt for its class, such as `photo of a dog`; "" for none.

    Raises:
        ConfigError: If `instance` is blank.
    """
    if not instance.strip():
        raise ConfigError(
            "the instance prompt is empty; a subject needs a prompt with a unique word for it, such as --instance "
            "'photo of sks dog'"
        )
    prior = {"prior": {"prompt": class_prompt}} if class_prompt else {}
    return {"data": {"folder": Path(data), "instance_prompt": instance}, "output": Path(output), **prior}
