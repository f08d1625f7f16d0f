"""How parameters move: optimizer, rates and their schedule."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lora_diffusion.config.adapter import AboveZero, NotNegative
from lora_diffusion.config.settings import Positive, Settings

Count = Annotated[int, Field(ge=0)]

KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "prodigy": {"learning_rate": 1.0, "embedding_learning_rate": 1.0},
    "schedule-free": {"schedule": "constant"},
}
"""What a kind of optimizer has instead of the defaults below."""


class OptimizerConfig(Settings):
    """How parameters move."""

    kind: str = "adamw"
    """adamw, adamw-8bit, paged-adamw-8bit, prodigy, adafactor, lion, schedule-free, or a class by its import path."""
    learning_rate: AboveZero = 1e-4
    """Peak rate of the UNet's factors. 1 for prodigy if left out, which finds the rate that this is a factor of; lion
    wants three to ten times less than adamw."""
    text_encoder_learning_rate: AboveZero | tuple[AboveZero, ...] | None = None
    """Peak rate of the text encoders' factors, one for all or one for each; a tenth of the UNet's if left out (with
    prodigy the same, as it has one rate)."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=64)] = 1.0
    """How many times the rate of the first factor that of the second is [LoRA+, arXiv 2402.12354]; 4 to 16 for it."""
    embedding_learning_rate: AboveZero = 5e-3
    """Peak rate of learned tokens' vectors."""
    rates: dict[str, NotNegative] = Field(default_factory=dict[str, float])
    """Factors on the rate by pattern of modules or of their factors, such as `"unet.down_blocks.*" = 0.5` or
    `"*.up" = 4`; factors of all patterns that match are multiplied, and 0 freezes."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """More arguments of the optimizer's class, such as `betas`."""
    schedule: Literal["constant", "linear", "cosine", "restarts"] = "cosine"
    """How the rate falls after warm-up; schedule-free means over steps instead, and has `constant`."""
    restarts: Positive = 1
    """How often `restarts` begins its cosine anew."""
    warmup_steps: Count = 20
    """Steps of linear warm-up."""
    max_gradient_norm: AboveZero = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a running mean of the parameters that is saved in their place; 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def apply_kind_defaults(cls, value: Any) -> Any:
        """Fill in the defaults of the optimizer kind, so that a run's record holds what it ran with."""
        kind = value.get("kind") if isinstance(value, dict) else None
        return {**KIND_DEFAULTS.get(kind, {}), **value} if isinstance(kind, str) else value

    @model_validator(mode="after")
    def check_rates(self) -> "OptimizerConfig":
        """Refuse two settings that both determine the learning rate of `up`."""
        ends = [pattern for pattern in self.rates if pattern.endswith(".up")]
        if self.loraplus_lr_ratio != 1 and ends:
            raise ValueError(
                f"loraplus_lr_ratio and the rate {ends[0]!r} both determine the rate of `up`; leave one out"
            )
        if self.loraplus_lr_ratio != 1 and self.kind == "prodigy":
            raise ValueError(
                "loraplus_lr_ratio and kind 'prodigy' both determine the learning rate; set loraplus_lr_ratio to 1, or "
                "kind to adamw"
            )
        return self

    @model_validator(mode="after")
    def check_averaging(self) -> "OptimizerConfig":
        """Refuse a schedule or moving average beside a schedule-free optimizer."""
        if self.kind == "schedule-free" and (self.schedule != "constant" or self.ema_decay):
            raise ValueError(
                "kind 'schedule-free' has a mean of its own; set schedule to 'constant' and ema_decay to 0"
            )
        return self
