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
    """What is trained."""

    kind: Kind = "lora"
    """lora, loha, lokr, vera, adalora, dylora, sparse or t-lora; `lora-diffusion methods` says what each is."""
    rank: Positive = 16
    """Rank of the two factors."""
    alpha: AboveZero | None = None
    """The update is scaled by alpha / rank; alpha is the rank if left out, so that a learning rate suits every rank."""
    scaling: Literal["rank", "sqrt-rank"] = "rank"
    """What alpha is divided by: the rank, or its root [rsLoRA, arXiv 2312.03732], so that high ranks learn as well."""
    ranks: dict[str, Positive] = Field(default_factory=dict[str, int])
    """Ranks by pattern of modules, such as `"unet.down_blocks.0.*" = 4`; the last that matches counts."""
    alphas: dict[str, AboveZero] = Field(default_factory=dict[str, float])
    """Alphas by pattern, in the same way."""
    dora: bool = False
    """Learn a magnitude for each output beside the direction [DoRA, arXiv 2402.09353]."""
    freeze_down: bool = False
    """Train the second factor alone [LoRA-FA, arXiv 2308.03303], which needs less memory for activations."""
    start: Literal["zero", "pissa", "orthogonal"] = "zero"
    """First factors: noise and zero; the base's main directions [PiSSA, arXiv 2404.02948]; or orthogonal ones."""
    dropout: Chance = 0.0
    """Share of the factors' input that is dropped in training."""
    rank_dropout: Chance = 0.0
    """Share of directions that are left out of a step, of each module anew."""
    module_dropout: Chance = 0.0
    """Chance that a module's update is left out of a step."""
    begin_with: Path | None = None
    """Adapter to go on from, of any kind that can be read; its kind, ranks, scales and modules hold instead of those
    here."""
    unet_targets: tuple[str, ...] = ("attention", "feed-forward", "projections")
    """Named sets (attention, cross-attention, feed-forward, projections, convolutions, b-lora-content, b-lora-style,
    all) or patterns. Attention alone leaves a gap to full fine-tuning that feed-forward layers close."""
    text_encoder_targets: tuple[str, ...] = ()
    """Named sets (attention, feed-forward, all) or patterns; empty trains the UNet only and caches the captions."""
    full_targets: tuple[str, ...] = ()
    """Patterns over whole paths, such as `unet.conv_in` or `unet.*.norm?`, of modules that are trained in full beside
    the factors and saved as differences."""
    max_norm: AboveZero | None = None
    """Largest Frobenius norm of any module's delta; larger ones are scaled back after each step."""
    lokr_factor: Annotated[int, Field(ge=2)] = 8
    """Largest side of LoKr's small matrix; a weight's sides are divided by the largest divisor up to this."""
    adalora_start: Annotated[float, Field(ge=1, le=8)] = 1.5
    """AdaLoRA begins with so many times the rank, and takes directions away until the mean is the rank."""
    least_rank: Positive = 1
    """Directions of `t-lora` that act in pure noise; all act at the end."""
    sparse_l1: NotNegative = 0.0
    """How strongly `sparse` pulls each direction's gate to zero, per unit of learning rate [arXiv 2311.11696]."""
    sparse_keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of directions that `sparse` keeps from the middle of the run on, the strongest of the UNet's and of
    each text encoder's."""

    @model_validator(mode="after")
    def check_combinations(self) -> "AdapterConfig":
        """Refuse settings that make no sense together, by name."""
        for nonsense, sentence in INVALID_COMBINATIONS:
            if nonsense(self):
                raise ValueError(sentence.format(kind=self.kind, start=self.start))
        return self

    @model_validator(mode="after")
    def check_init_from(self) -> "AdapterConfig":
        """Refuse what a file to go on from says itself."""
        told = [name for name in SETTINGS_OF_FILE if getattr(self, name) != default_value(name)]
        if self.begin_with is not None and told:
            raise ValueError(f"begin_with goes on as the file is; leave out {' and '.join(told)}")
        return self

    @model_validator(mode="after")
    def check_unused_settings(self) -> "AdapterConfig":
        """Refuse a setting of a kind that is not chosen."""
        for field, kind in KIND_OF.items():
            if self.kind != kind and getattr(self, field) != default_value(field):
                raise ValueError(f"{field} belongs to kind '{kind}'; '{self.kind}' has no use for it")
        return self

    @property
    def trains_text_encoder(self) -> bool:
        """Whether modules of text encoders may be trained."""
        return bool(self.text_encoder_targets) or any(not each.startswith("unet.") for each in self.full_targets)


def default_value(name: str) -> object:
    """Of a setting."""
    return AdapterConfig.model_fields[name].get_default(call_default_factory=True)


SETTINGS_OF_FILE = (
    *("kind", "rank", "alpha", "scaling", "ranks", "alphas", "dora", "freeze_down", "start"),
    *("unet_targets", "full_targets"),
)
"""Settings that an adapter to go on from brings."""
PRODUCT_KINDS = ("lora", "vera", "adalora", "dylora", "sparse", "t-lora")
"""Kinds whose delta is the product of two factors."""
FACTORED_KINDS = ("lora", "dylora", "t-lora")
"""Kinds whose delta is that of two factors `down` and `up` and of nothing else."""
KIND_OF = {
    "sparse_l1": "sparse",
    "sparse_keep": "sparse",
    "least_rank": "t-lora",
    "lokr_factor": "lokr",
    "adalora_start": "adalora",
}
"""Settings that one kind alone has."""
PRUNING_KINDS = ("adalora", "sparse")
"""Kinds that take directions away as a run goes on."""
TIMESTEP_KINDS = ("t-lora",)
"""Kinds that change with the timestep, which a text encoder does not know."""
INVALID_COMBINATIONS: tuple[tuple[Callable[[AdapterConfig], bool], str], ...] = (
    (
        lambda c: c.dora and c.kind not in ("lora", "loha", "lokr"),
        "dora and kind '{kind}' do not go together, as the magnitude needs a delta of its own; set dora to false, or "
        "kind to lora, loha or lokr",
    ),
    (
        lambda c: c.freeze_down and c.kind != "lora",
        "freeze_down and kind '{kind}' do not go together; set freeze_down to false, or kind to lora",
    ),
    (
        lambda c: c.start != "zero" and c.kind != "lora" and (c.start, c.kind) != ("orthogonal", "t-lora"),
        "start '{start}' and kind '{kind}' do not go together; set start to zero, or kind to lora",
    ),
    (
        lambda c: c.start == "pissa" and c.freeze_down,
        "start 'pissa' and freeze_down do not go together, as the main directions would never turn; leave one out",
    ),
    (
        lambda c: c.start == "pissa" and c.dora,
        "start 'pissa' and dora do not go together, as both move the base's norm; leave one out",
    ),
    (
        lambda c: c.scaling == "sqrt-rank" and c.alpha is None,
        "scaling 'sqrt-rank' needs alpha, as without it every scale is 1 whatever the rank; set alpha, e.g. to 4",
    ),
    (
        lambda c: c.scaling == "sqrt-rank" and c.kind in ("vera", "lokr"),
        "scaling 'sqrt-rank' and kind '{kind}' do not go together; set scaling to rank",
    ),
    (
        lambda c: bool(c.dropout or c.rank_dropout or c.module_dropout) and (c.kind in ("loha", "lokr") or c.dora),
        "dropout is of plain factors, and kind '{kind}' or dora has none that could be dropped; set dropout, "
        "rank_dropout and module_dropout to 0",
    ),
    (
        lambda c: c.max_norm is not None and (c.kind not in FACTORED_KINDS or c.dora or c.start == "pissa"),
        "max_norm scales plain factors, which kind '{kind}' with these settings has not; leave it out",
    ),
    (
        lambda c: c.max_norm is not None and bool(c.freeze_down or c.full_targets),
        "max_norm shrinks both factors, and freeze_down or full_targets leave none or one that may; leave one out",
    ),
    (
        lambda c: c.kind in TIMESTEP_KINDS and c.trains_text_encoder,
        "kind '{kind}' and text_encoder_targets do not go together, as text is read before there is a timestep; set "
        "text_encoder_targets to [], and begin each of full_targets with `unet.`",
    ),
    (
        lambda c: c.kind in TIMESTEP_KINDS and c.least_rank > c.rank,
        "least_rank and rank of kind '{kind}' do not go together, as more directions would begin than there are; lower "
        "least_rank",
    ),
    (
        lambda c: bool(c.ranks) and c.kind in ("vera", "adalora"),
        "ranks and kind '{kind}' do not go together, as one rank is shared by all modules; leave ranks out",
    ),
)
