"""What is trained: which modules, by which method, how large. What makes no sense together is refused here."""

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
    """lora, loha, lokr, vera, adalora, dylora, sparse or t-lora; `lora-diffusion methods` says what each is."""
    rank: Positive = 16
    """Rank of the two factors."""
    alpha: AboveZero | None = None
    """The update is scaled by alpha / rank; alpha is the rank if left out, so that a learning rate suits every rank."""
    use_rslora: bool = False
    """Divide alpha by the square root of the rank instead of the rank [rsLoRA, arXiv 2312.03732], for high ranks."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict[str, int])
    """Ranks by module pattern, such as `"unet.down_blocks.0.*" = 4`; the last match counts."""
    alpha_pattern: dict[str, AboveZero] = Field(default_factory=dict[str, float])
    """Alphas by module pattern; the last match counts."""
    use_dora: bool = False
    """Learn a magnitude for each output beside the direction [DoRA, arXiv 2402.09353]."""
    freeze_down: bool = False
    """Train the second factor alone [LoRA-FA, arXiv 2308.03303], which needs less memory for activations."""
    init_weights: Literal["zero", "pissa", "orthogonal"] = "zero"
    """Initial factors: `zero` is noise times zero; `pissa` the base's main directions [PiSSA, arXiv 2404.02948];
    `orthogonal` orthogonal rows times zero."""
    dropout: Chance = 0.0
    """Share of the factors' input that is dropped in training."""
    rank_dropout: Chance = 0.0
    """Share of directions that are left out of a step, of each module anew."""
    module_dropout: Chance = 0.0
    """Chance that a module's update is left out of a step."""
    init_from: Path | None = None
    """Adapter file to continue training from; its kind, ranks, scales and modules replace the settings here."""
    unet_target_modules: tuple[str, ...] = ("attention", "feed-forward", "projections")
    """Named sets (attention, cross-attention, feed-forward, projections, convolutions, b-lora-content, b-lora-style,
    all) or patterns. Attention alone leaves a gap to full fine-tuning that feed-forward layers close."""
    text_encoder_target_modules: tuple[str, ...] = ()
    """Named sets (attention, feed-forward, all) or patterns; empty trains the UNet only and caches the captions."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns over whole paths, such as `unet.conv_in` or `unet.*.norm?`, of modules that are fully trained and saved
    as differences, in addition to the low-rank factors."""
    max_delta_norm: AboveZero | None = None
    """Largest Frobenius norm of any module's delta; larger ones are scaled back after each step."""
    decompose_factor: Annotated[int, Field(ge=2)] = 8
    """Largest side of LoKr's small matrix; a weight's sides are divided by the largest divisor up to this."""
    adalora_init_ratio: Annotated[float, Field(ge=1, le=8)] = 1.5
    """AdaLoRA's initial rank, as a multiple of `rank`; directions are pruned until the mean rank is `rank`."""
    min_rank: Positive = 1
    """Active rank of `t-lora` at the noisiest timestep; the full rank is active at the last one."""
    sparse_l1: NotNegative = 0.0
    """How strongly `sparse` pulls each direction's gate to zero, per unit of learning rate [arXiv 2311.11696]."""
    sparse_keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of directions that `sparse` keeps from the middle of the run on, the strongest of the UNet's and of
    each text encoder's."""

    @model_validator(mode="after")
    def check_combinations(self) -> "AdapterConfig":
        """Refuse settings that contradict each other, by name."""
        for nonsense, sentence in INVALID_COMBINATIONS:
            if nonsense(self):
                raise ValueError(sentence.format(kind=self.kind, init=self.init_weights))
        return self

    @model_validator(mode="after")
    def check_init_from(self) -> "AdapterConfig":
        """Refuse settings that the adapter to continue from already determines."""
        told = [name for name in SETTINGS_OF_FILE if getattr(self, name) != default_value(name)]
        if self.init_from is not None and told:
            raise ValueError(
                f"init_from takes {' and '.join(told)} from the file; leave {'it' if len(told) == 1 else 'them'} out"
            )
        return self

    @model_validator(mode="after")
    def check_unused_settings(self) -> "AdapterConfig":
        """Refuse settings that belong to another kind of adapter."""
        for field, kind in KIND_OF.items():
            if self.kind != kind and getattr(self, field) != default_value(field):
                raise ValueError(f"{field} belongs to kind '{kind}'; '{self.kind}' has no use for it")
        return self

    @property
    def trains_text_encoder(self) -> bool:
        """Whether modules of text encoders may be trained."""
        return bool(self.text_encoder_target_modules) or any(
            not each.startswith("unet.") for each in self.modules_to_save
        )


def default_value(name: str) -> object:
    """Return the default value of an `AdapterConfig` setting."""
    return AdapterConfig.model_fields[name].get_default(call_default_factory=True)


SETTINGS_OF_FILE = (
    *(
        "kind",
        "rank",
        "alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "freeze_down",
        "init_weights",
    ),
    *("unet_target_modules", "modules_to_save"),
)
"""Settings that an adapter to go on from brings."""
PRODUCT_KINDS = ("lora", "vera", "adalora", "dylora", "sparse", "t-lora")
"""Kinds whose delta is the product of two factors."""
FACTORED_KINDS = ("lora", "dylora", "t-lora")
"""Kinds whose delta is that of two factors `down` and `up` and of nothing else."""
KIND_OF = {
    "sparse_l1": "sparse",
    "sparse_keep": "sparse",
    "min_rank": "t-lora",
    "decompose_factor": "lokr",
    "adalora_init_ratio": "adalora",
}
"""Settings that one kind alone has."""
PRUNING_KINDS = ("adalora", "sparse")
"""Kinds that take directions away as a run goes on."""
TIMESTEP_KINDS = ("t-lora",)
"""Kinds that change with the timestep, which a text encoder does not know."""
INVALID_COMBINATIONS: tuple[tuple[Callable[[AdapterConfig], bool], str], ...] = (
    (
        lambda c: c.use_dora and c.kind not in ("lora", "loha", "lokr"),
        "use_dora and kind '{kind}' do not go together, as the magnitude needs a delta of its own; set use_dora to "
        "false, or "
        "kind to lora, loha or lokr",
    ),
    (
        lambda c: c.freeze_down and c.kind != "lora",
        "freeze_down and kind '{kind}' do not go together; set freeze_down to false, or kind to lora",
    ),
    (
        lambda c: (
            c.init_weights != "zero" and c.kind != "lora" and (c.init_weights, c.kind) != ("orthogonal", "t-lora")
        ),
        "init_weights '{init}' and kind '{kind}' do not go together; set init_weights to zero, or kind to lora",
    ),
    (
        lambda c: c.init_weights == "pissa" and c.freeze_down,
        "init_weights 'pissa' and freeze_down do not go together, as main directions would stay fixed; leave one out",
    ),
    (
        lambda c: c.init_weights == "pissa" and c.use_dora,
        "init_weights 'pissa' and use_dora do not go together, as both change the base's norm; leave one out",
    ),
    (
        lambda c: c.use_rslora and c.alpha is None,
        "use_rslora needs alpha, as without it every scale is 1 whatever the rank; set alpha, e.g. to 4",
    ),
    (
        lambda c: c.use_rslora and c.kind in ("vera", "lokr"),
        "use_rslora and kind '{kind}' do not go together; set use_rslora to false",
    ),
    (
        lambda c: bool(c.dropout or c.rank_dropout or c.module_dropout) and (c.kind in ("loha", "lokr") or c.use_dora),
        "dropout is of plain factors, and kind '{kind}' or use_dora has none that could be dropped; set dropout, "
        "rank_dropout and module_dropout to 0",
    ),
    (
        lambda c: (
            c.max_delta_norm is not None and (c.kind not in FACTORED_KINDS or c.use_dora or c.init_weights == "pissa")
        ),
        "max_delta_norm scales plain factors, which kind '{kind}' with these settings has not; leave it out",
    ),
    (
        lambda c: c.max_delta_norm is not None and bool(c.freeze_down or c.modules_to_save),
        "max_delta_norm scales both factors of every module, unlike freeze_down and modules_to_save; leave one out",
    ),
    (
        lambda c: c.kind in TIMESTEP_KINDS and c.trains_text_encoder,
        "kind '{kind}' and text_encoder_target_modules do not go together, as text is encoded before there is a "
        "timestep; set text_encoder_target_modules to [], and begin each of modules_to_save with `unet.`",
    ),
    (
        lambda c: c.kind in TIMESTEP_KINDS and c.min_rank > c.rank,
        "min_rank and rank of kind '{kind}' do not go together, as more directions would begin than there are; lower "
        "min_rank",
    ),
    (
        lambda c: bool(c.rank_pattern) and c.kind in ("vera", "adalora"),
        "rank_pattern and kind '{kind}' do not go together, as all modules share one rank; leave rank_pattern out",
    ),
)
