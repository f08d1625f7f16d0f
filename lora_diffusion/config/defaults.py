"""Default settings of training, by family of the base, purpose and GPU memory.

Sources: the Hugging Face DreamBooth study and advanced SDXL script, kohya's documentation, OneTrainer's presets, and
spacepxl's "demystifying sd finetuning", as far as they agree, and measurements on the embedded base. Reasons:

- Attention and feed-forward layers are trained: attention alone falls short of full fine-tuning at any rank.
- alpha = rank: the effective learning rate then does not depend on the rank.
- A learning rate of 1e-4 for Stable Diffusion: the middle of all sources' ranges for AdamW. The embedded base is small
  and needs 3e-3.
- Text encoders are trained at a low rate for subjects on SD 1.x and 2.x, which must learn a new word, and not at all on
  SDXL and for styles, where the sources report no gain and worse prompt following.
- Subjects train for fewer steps, because few images overfit soon, with prior preservation by the base's own
  predictions, which needs no class images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_diffusion.config.settings import EMBEDDED_BASE, BaseName, Settings, deep_merge

Purpose = Literal["style", "dreambooth"]
"""What is trained: a style, or a subject (DreamBooth)."""
GpuGigabytes = Literal[8, 12, 24]
"""GPU memory for which there are memory-saving settings, in GB."""


AdapterOutput = Annotated[
    Path,
    Field(
        description="Adapter file to write (.safetensors). All other files of the run go to the folder `NAME-run` "
        "beside it."
    ),
]
"""File that a training run writes."""
TriggerWords = Annotated[
    tuple[str, ...], Field(description="Trigger words of the adapter, which are recorded in the file.")
]
"""Words in the captions that stand for what is trained."""
InstancePrompt = Annotated[
    str,
    Field(
        description="Instance prompt: caption of images without one, such as `photo of sks dog`; if empty, a missing "
        "caption is an error."
    ),
]
"""Prompt that names the subject by a rare word."""
ClassPrompt = Annotated[str, Field(description="Class prompt, such as `photo of a dog`.")]
"""Prompt that names the class of the subject."""


class QuickTrainConfig(Settings):
    """The settings that a training run without a TOML file takes as flags.

    They are those of `TrainConfig`, which has so many that importing it would delay the help of all commands.
    """

    output: AdapterOutput
    trigger_words: TriggerWords = ()
    instance_prompt: InstancePrompt = ""
    class_prompt: ClassPrompt = ""


class DefaultsConfig(Settings):
    """What the defaults of a training run depend on, besides its purpose."""

    base: BaseName = EMBEDDED_BASE
    gpu_gb: GpuGigabytes | None = None
    """GPU memory in GB to choose memory-saving settings for; without it the settings of the family are unchanged."""


_LARGE_FAMILY: dict[str, Any] = {
    "batch_size": 1,
    "gradient_accumulation": 4,
    "adapter": {"rank": 16},
    "optimizer": {"learning_rate": 1e-4, "warmup_steps": 50},
}
_SMALL_FAMILY: dict[str, Any] = {
    "batch_size": 4,
    "adapter": {
        "rank": 8,
        "unet_target_modules": ["attention", "feed-forward", "projections", "convolutions"],
        "text_encoder_target_modules": ["attention"],
    },
    "optimizer": {"learning_rate": 3e-3, "text_encoder_learning_rate": 5e-4, "warmup_steps": 20},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": _LARGE_FAMILY,
    "sd2": _LARGE_FAMILY,
    "sdxl": {**_LARGE_FAMILY, "adapter": {"rank": 32}, "compute": {"gradient_checkpointing": True}},
    "tiny-sd": _SMALL_FAMILY,
    "tiny-sdxl": _SMALL_FAMILY,
}
"""Settings by family of the base."""
STEPS: dict[Purpose, dict[str, int]] = {
    "style": {"sd1": 1000, "sd2": 1000, "sdxl": 1000, "tiny-sd": 600, "tiny-sdxl": 600},
    "dreambooth": {"sd1": 400, "sd2": 400, "sdxl": 500, "tiny-sd": 400, "tiny-sdxl": 400},
}
"""Optimizer steps by purpose and family."""
SUBJECT: dict[str, Any] = {"prior": {"mode": "prediction", "weight": 0.5}, "captions": {"dropout": 0.0}}
"""Settings of a subject (DreamBooth) on any family."""
SUBJECT_TEXT_ENCODER: dict[str, Any] = {
    "adapter": {"text_encoder_target_modules": ["attention"]},
    "optimizer": {"text_encoder_learning_rate": 1e-5},
}
"""Further settings of a subject on SD 1.x and 2.x, where the text encoder is trained too."""


MEMORY: dict[int, dict[str, dict[str, Any]]] = {
    8: {
        "sd": {"compute": {"gradient_checkpointing": True}},
        "sdxl": {
            "adapter": {"rank": 16},
            "optimizer": {"kind": "adamw-8bit"},
            "compute": {"gradient_checkpointing": True, "offload": True},
        },
    },
    12: {"sd": {}, "sdxl": {"compute": {"gradient_checkpointing": True, "offload": True}}},
    24: {
        "sd": {"batch_size": 4, "gradient_accumulation": 1},
        "sdxl": {"batch_size": 2, "gradient_accumulation": 2, "compute": {"gradient_checkpointing": True}},
    },
}
"""Settings that fit a GPU, by its memory in GB and the kind of base.

The effective batch size (batch_size * gradient_accumulation) is always 4, so that nothing else has to change.
"""


def memory_settings(family: str, gigabytes: int) -> dict[str, Any]:
    """Return the settings for a GPU with this much memory; none for the embedded bases, which fit everywhere."""
    return {} if family.startswith("tiny") else MEMORY[gigabytes]["sdxl" if family == "sdxl" else "sd"]


def default_settings(purpose: Purpose, family: str) -> dict[str, Any]:
    """Return the default settings of a `TrainConfig`, except for data and output, by the family of the base."""
    table = {**FAMILIES[family], "steps": STEPS[purpose][family]}
    if purpose == "dreambooth":
        table = deep_merge(table, SUBJECT)
        if family in ("sd1", "sd2"):
            table = deep_merge(table, SUBJECT_TEXT_ENCODER)
    return table


def with_precision(table: Mapping[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    """Return the settings with bf16 mixed precision on a GPU, and with none on a CPU, which gains nothing from it."""
    return deep_merge(table, {"compute": {"mixed_precision": "bf16" if on_gpu else "no"}})
