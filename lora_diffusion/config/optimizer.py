"""Settings of the optimizer: kind, learning rates and their schedule."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from lora_diffusion.config.adapter import AboveZero, NotNegative
from lora_diffusion.config.settings import Positive, Settings

Count = Annotated[int, Field(ge=0)]
"""An integer of at least 0."""

KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "prodigy": {"learning_rate": 1.0, "embedding_learning_rate": 1.0},
    "schedule-free": {"schedule": "constant"},
}
"""Defaults that differ by kind of optimizer."""


class OptimizerConfig(Settings):
    """Optimizer, learning rates and their schedule."""

    kind: str = "adamw"
    """Optimizer: adamw, adamw-8bit, paged-adamw-8bit, prodigy, adafactor, lion, schedule-free, or the import path of a
    class."""
    learning_rate: AboveZero = 1e-4
    """Peak learning rate of the UNet's layers. prodigy multiplies it by the rate that it estimates, so its default is
    1; lion needs 3 to 10 times less than adamw."""
    text_encoder_learning_rate: AboveZero | tuple[AboveZero, ...] | None = None
    """Peak learning rate of the text encoders' layers, one for all or one for each; by default a tenth of the UNet's
    (with prodigy the same, because it has a single rate)."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=64)] = 1.0
    """Learning rate of up divided by that of down [LoRA+, arXiv 2402.12354]; 4 to 16 are common."""
    embedding_learning_rate: AboveZero = 5e-3
    """Peak learning rate of textual-inversion embeddings."""
    rates: dict[str, NotNegative] = Field(default_factory=dict[str, float])
    """Multipliers of the learning rate by pattern of modules or parameters, such as `"unet.down_blocks.*" = 0.5` or
    `"*.up" = 4`; those of all matching patterns are multiplied, and 0 freezes."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Further arguments of the optimizer's class, such as `betas`."""
    schedule: Literal["constant", "linear", "cosine", "restarts"] = "cosine"
    """Learning-rate schedule after the warm-up; schedule-free averages over steps instead and needs `constant`."""
    restarts: Positive = 1
    """Number of restarts of the cosine with the schedule `restarts`."""
    warmup_steps: Count = 20
    """Number of linear warm-up steps."""
    max_gradient_norm: AboveZero = 1.0
    """Maximum norm of the gradients; larger ones are clipped."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the parameters, which is saved in their place; 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def apply_kind_defaults(cls, value: Any) -> Any:
        """Fill in the defaults of the optimizer kind, so that a run's record holds what it ran with."""
        if not isinstance(value, dict):
            return value
        table = cast("dict[str, Any]", value)
        kind = table.get("kind")
        return {**KIND_DEFAULTS.get(kind, {}), **table} if isinstance(kind, str) else table

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
        """Refuse a schedule or moving average with a schedule-free optimizer."""
        if self.kind == "schedule-free" and (self.schedule != "constant" or self.ema_decay):
            raise ValueError(
                "kind 'schedule-free' computes a mean of its own; set schedule to 'constant' and ema_decay to 0"
            )
        return self
