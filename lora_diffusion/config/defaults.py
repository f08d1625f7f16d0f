"""What a run has where nothing else is said, by family and purpose.

Sources: the HF DreamBooth study and SDXL advanced script, kohya's documentation, OneTrainer's presets, and spacepxl's
"demystifying sd finetuning"; what they agree on is taken, and what the embedded base showed. Why, for each:

- attention and feed-forward layers: attention alone leaves a gap to full fine-tuning at any rank.
- alpha = rank: the effective rate then does not depend on the rank.
- 1e-4 for the real families: the middle of every source's range for AdamW. The embedded base is small and wants 3e-3.
- text encoders: trained a little on SD 1.x and 2.x for subjects, whose new word they must learn; left alone on SDXL and
  for styles, where sources find no gain and prompts suffer.
- subjects: fewer steps, as few pictures overfit soon, and a pull towards the base's own predictions for the class,
  which keeps the class without class pictures.
"""

from collections.abc import Mapping
from typing import Any, Literal

from lora_diffusion.config.settings import deep_merge

Purpose = Literal["style", "dreambooth"]

LARGE: dict[str, Any] = {
    "batch_size": 1,
    "gradient_accumulation": 4,
    "adapter": {"rank": 16},
    "optimizer": {"learning_rate": 1e-4, "warmup_steps": 50},
}
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "adapter": {
        "rank": 8,
        "unet_target_modules": ["attention", "feed-forward", "projections", "convolutions"],
        "text_encoder_target_modules": ["attention"],
    },
    "optimizer": {"learning_rate": 3e-3, "text_encoder_learning_rate": 5e-4, "warmup_steps": 20},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": LARGE,
    "sd2": LARGE,
    "sdxl": {**LARGE, "adapter": {"rank": 32}, "compute": {"gradient_checkpointing": True}},
    "tiny-sd": SMALL,
    "tiny-sdxl": SMALL,
}
STEPS: dict[Purpose, dict[str, int]] = {
    "style": {"sd1": 1000, "sd2": 1000, "sdxl": 1000, "tiny-sd": 600, "tiny-sdxl": 600},
    "dreambooth": {"sd1": 400, "sd2": 400, "sdxl": 500, "tiny-sd": 400, "tiny-sdxl": 400},
}
SUBJECT: dict[str, Any] = {"prior": {"mode": "prediction", "weight": 0.5}, "captions": {"dropout": 0.0}}
SUBJECT_WORD: dict[str, Any] = {
    "adapter": {"text_encoder_target_modules": ["attention"]},
    "optimizer": {"text_encoder_learning_rate": 1e-5},
}


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
"""What fits a GPU of so many gigabytes, by kind of base. The global batch stays 4, so that nothing else need change."""


def memory_settings(family: str, gigabytes: int) -> dict[str, Any]:
    """What is changed for a GPU of so many gigabytes; the embedded bases need nothing."""
    return {} if family.startswith("tiny") else MEMORY[gigabytes]["sdxl" if family == "sdxl" else "sd"]


def default_settings(purpose: Purpose, family: str) -> dict[str, Any]:
    """The settings of a `TrainConfig` but for data and output; `family` is the base's."""
    table = {**FAMILIES[family], "steps": STEPS[purpose][family]}
    if purpose == "dreambooth":
        table = deep_merge(table, SUBJECT)
        if family in ("sd1", "sd2"):
            table = deep_merge(table, SUBJECT_WORD)
    return table


def with_precision(table: Mapping[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    """Half precision where there is a GPU to gain from it."""
    return deep_merge(table, {"compute": {"mixed_precision": "bf16" if on_gpu else "no"}})
