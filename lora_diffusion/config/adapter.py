"""Settings of the trained adapter: kind, rank, initialization, target modules, and which of them exclude each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lora_diffusion.config.settings import Positive, Settings

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Chance = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["lora", "loha", "lokr", "vera", "adalora", "dylora", "sparse", "t-lora"]


class AdapterConfig(Settings):
    """Settings of the trained adapter: method, rank, initialization and target modules."""

    kind: Kind = "lora"
    """lora, loha, lokr, vera, adalora, dylora, sparse or t-lora; `lora-diffusion methods` describes them."""
    rank: Positive = 16
    """Rank of the factors (kohya: network_dim)."""
    alpha: AboveZero | None = None
    """The delta is scaled by alpha / rank (kohya: network_alpha); alpha = rank by default, a scale of 1."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank [rsLoRA, arXiv 2312.03732]; for high ranks."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict[str, int])
    """Ranks by module pattern, such as `"unet.down_blocks.0.*" = 4`; the last matching pattern counts."""
    alpha_pattern: dict[str, AboveZero] = Field(default_factory=dict[str, float])
    """Alphas by module pattern; the last matching pattern counts."""
    use_dora: bool = False
    """Train a magnitude per output in addition to a low-rank direction [DoRA, arXiv 2402.09353]."""
    freeze_down: bool = False
    """Freeze the down factor and train only up [LoRA-FA, arXiv 2308.03303]; needs less memory for activations."""
    init_weights: Literal["zero", "pissa", "orthogonal"] = "zero"
    """Initial factors: `zero`, a random down and an up of 0; `pissa`, the main singular directions of the base's weight
    [PiSSA, arXiv 2404.02948]; `orthogonal`, a down with orthogonal rows and an up of 0."""
    dropout: Chance = 0.0
    """Dropout probability of the adapter's input (PEFT: lora_dropout)."""
    rank_dropout: Chance = 0.0
    """Probability of dropping each rank dimension of a module in a step."""
    module_dropout: Chance = 0.0
    """Probability of dropping the whole delta of a module in a step."""
    init_from: Path | None = None
    """Adapter file to continue training from; it determines kind, ranks, alphas and target modules."""
    unet_target_modules: tuple[str, ...] = ("attention", "feed-forward", "projections")
    """UNet modules to train: named sets (attention, cross-attention, feed-forward, projections, convolutions,
    b-lora-content, b-lora-style, all) or patterns. Attention alone falls short of full fine-tuning."""
    text_encoder_target_modules: tuple[str, ...] = ()
    """Text-encoder modules to train: named sets (attention, feed-forward, all) or patterns. Empty trains the UNet only,
    and captions are encoded just once."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules that are trained in full and saved as differences, in addition to the low-rank layers, such
    as `unet.conv_in` or `unet.*.norm?`."""
    max_delta_norm: AboveZero | None = None
    """Maximum Frobenius norm of each module's delta; larger deltas are scaled down after each step (kohya:
    scale_weight_norms)."""
    decompose_factor: Annotated[int, Field(ge=2)] = 8
    """LoKr: upper limit of the size of the small matrix; the largest divisor of the weight's size up to it is used."""
    adalora_init_ratio: Annotated[float, Field(ge=1, le=8)] = 1.5
    """AdaLoRA: initial rank as a multiple of `rank`; directions are pruned until the mean rank is `rank`."""
    min_rank: Positive = 1
    """T-LoRA: active rank at the noisiest timestep; at the last one the full rank is active."""
    sparse_l1: NotNegative = 0.0
    """Sparse: strength of the L1 penalty on the gates of the rank dimensions [SoRA, arXiv 2311.11696]."""
    sparse_keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Sparse: fraction of rank dimensions to keep from the middle of the run on, the strongest ones of the UNet and of
    each text encoder."""

    @model_validator(mode="after")
    def check_combinations(self) -> "AdapterConfig":
        """Refuse settings that contradict each other."""
        for is_invalid, message in INVALID_COMBINATIONS:
            if is_invalid(self):
                raise ValueError(message.format(kind=self.kind, init=self.init_weights))
        return self

    @model_validator(mode="after")
    def check_init_from(self) -> "AdapterConfig":
        """Refuse settings that the adapter to continue from already determines."""
        given = [name for name in SETTINGS_OF_FILE if getattr(self, name) != _default_value(name)]
        if self.init_from is not None and given:
            raise ValueError(
                f"init_from takes {' and '.join(given)} from the file; leave {'it' if len(given) == 1 else 'them'} out"
            )
        return self

    @model_validator(mode="after")
    def check_unused_settings(self) -> "AdapterConfig":
        """Refuse settings that belong to another kind of adapter."""
        for field, kind in KIND_OF.items():
            if self.kind != kind and getattr(self, field) != _default_value(field):
                raise ValueError(f"{field} is a setting of kind '{kind}'; kind '{self.kind}' does not use it")
        return self

    @property
    def trains_text_encoder(self) -> bool:
        """Whether modules of text encoders may be trained."""
        return bool(self.text_encoder_target_modules) or any(
            not each.startswith("unet.") for each in self.modules_to_save
        )


def _default_value(name: str) -> object:
    """Return the default value of an `AdapterConfig` setting."""
    return AdapterConfig.model_fields[name].get_default(call_default_factory=True)


SETTINGS_OF_FILE = (
    "kind",
    "rank",
    "alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "freeze_down",
    "init_weights",
    "unet_target_modules",
    "modules_to_save",
)
"""Settings that are taken from the file of `init_from`."""
PRODUCT_KINDS = ("lora", "vera", "adalora", "dylora", "sparse", "t-lora")
"""Kinds whose delta is a product of two low-rank factors."""
FACTORED_KINDS = ("lora", "dylora", "t-lora")
"""Kinds whose delta is determined by the two factors `down` and `up` alone."""
KIND_OF = {
    "sparse_l1": "sparse",
    "sparse_keep": "sparse",
    "min_rank": "t-lora",
    "decompose_factor": "lokr",
    "adalora_init_ratio": "adalora",
}
"""Settings that only one kind uses."""
PRUNING_KINDS = ("adalora", "sparse")
"""Kinds that prune directions during training."""
TIMESTEP_KINDS = ("t-lora",)
"""Kinds whose delta depends on the timestep, and which therefore cannot be applied to text encoders."""
INVALID_COMBINATIONS: tuple[tuple[Callable[[AdapterConfig], bool], str], ...] = (
    (
        lambda c: c.use_dora and c.kind not in ("lora", "loha", "lokr"),
        "use_dora does not support kind '{kind}'; set kind to lora, loha or lokr, or use_dora to false",
    ),
    (
        lambda c: c.freeze_down and c.kind != "lora",
        "freeze_down does not support kind '{kind}'; set kind to lora, or freeze_down to false",
    ),
    (
        lambda c: (
            c.init_weights != "zero" and c.kind != "lora" and (c.init_weights, c.kind) != ("orthogonal", "t-lora")
        ),
        "init_weights '{init}' does not support kind '{kind}'; set kind to lora, or init_weights to zero",
    ),
    (
        lambda c: c.init_weights == "pissa" and c.freeze_down,
        "init_weights 'pissa' and freeze_down cannot be combined, because the base's main directions would stay fixed; "
        "leave one out",
    ),
    (
        lambda c: c.init_weights == "pissa" and c.use_dora,
        "init_weights 'pissa' and use_dora cannot be combined, because both change the norm of the base's weights; "
        "leave one out",
    ),
    (
        lambda c: c.use_rslora and c.alpha is None,
        "use_rslora has no effect without alpha, because alpha is then chosen so that the scale is 1; set alpha, e.g. "
        "to 4",
    ),
    (
        lambda c: c.use_rslora and c.kind in ("vera", "lokr"),
        "use_rslora does not support kind '{kind}'; set use_rslora to false",
    ),
    (
        lambda c: bool(c.dropout or c.rank_dropout or c.module_dropout) and (c.kind in ("loha", "lokr") or c.use_dora),
        "dropout, rank_dropout and module_dropout support plain LoRA factors only, not kind '{kind}' or use_dora; set "
        "them to 0",
    ),
    (
        lambda c: (
            c.max_delta_norm is not None and (c.kind not in FACTORED_KINDS or c.use_dora or c.init_weights == "pissa")
        ),
        "max_delta_norm supports plain LoRA factors only, not kind '{kind}' with these settings; leave it out",
    ),
    (
        lambda c: c.max_delta_norm is not None and bool(c.freeze_down or c.modules_to_save),
        "max_delta_norm cannot be combined with freeze_down or modules_to_save, because it scales both factors of "
        "every module; leave one out",
    ),
    (
        lambda c: c.kind in TIMESTEP_KINDS and c.trains_text_encoder,
        "kind '{kind}' cannot be applied to text encoders, because it depends on the timestep; set "
        "text_encoder_target_modules to [], and use only `unet.` patterns in modules_to_save",
    ),
    (
        lambda c: c.kind in TIMESTEP_KINDS and c.min_rank > c.rank,
        "min_rank of kind '{kind}' is larger than rank; lower min_rank",
    ),
    (
        lambda c: bool(c.rank_pattern) and c.kind in ("vera", "adalora"),
        "rank_pattern does not support kind '{kind}', whose modules share one rank; leave rank_pattern out",
    ),
)
"""Conditions that are errors, with their messages."""
