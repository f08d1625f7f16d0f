"""The training methods: the settings that select each, its paper, and when to choose it.

A method is a set of training settings; its layers are implemented in `training/methods/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lora_diffusion.config.settings import deep_merge


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method."""

    name: str
    """Name of the method."""
    paper: str
    """arXiv number of the paper, with the section if it is a part of it."""
    about: str
    """What it does and when to choose it, in a few sentences."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that select the method, by section of the training config."""
    rate: float = 1.0
    """Factor on the learning rate of plain LoRA, or of embeddings, that was best on the embedded base
    (`compare_methods --part rates`)."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The settings in the form of `--set`, such as `adapter.use_dora=true`."""
        found: list[str] = []
        for section, values in self.settings.items():
            found += [f"{section}.{key}={format_toml(value)}" for key, value in values.items()]
        return tuple(found)


def format_toml(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_toml, cast('Sequence[Any]', value)))}]"
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        return f"{{ {', '.join(f'{format_toml(key)} = {format_toml(each)}' for key, each in entries)} }}"
    return str(value)


METHODS: tuple[Method, ...] = (
    Method(
        name="lora",
        paper="2106.09685",
        about="A product of two low-rank factors is added to the weight of each target module. Start here.",
    ),
    Method(
        name="rslora",
        paper="2312.03732",
        about="LoRA scaled by alpha / sqrt(rank), so that high ranks learn as fast as low ones. For ranks of 32 and "
        "more; at a fixed rank it is LoRA with another learning rate.",
        settings={"adapter": {"use_rslora": True, "alpha": 2.0}},
    ),
    Method(
        name="lora+",
        paper="2402.12354",
        about="LoRA with a higher learning rate for the up factor, which starts at zero, than for down. For short "
        "runs; ratios of 4 to 16 are common.",
        settings={"optimizer": {"loraplus_lr_ratio": 4.0}},
        rate=0.5,
    ),
    Method(
        name="lora-fa",
        paper="2308.03303",
        about="LoRA with a frozen down factor. Trains half as many parameters and does not store the inputs of the "
        "modules for the backward pass, which saves memory at the price of some quality.",
        settings={"adapter": {"freeze_down": True}},
        rate=3.0,
    ),
    Method(
        name="dora",
        paper="2402.09353",
        about="A trained magnitude per output in addition to a low-rank direction. Closer to full fine-tuning at low "
        "ranks, but slower, because the full weight is computed at each step. Its delta depends on the base.",
        settings={"adapter": {"use_dora": True}},
    ),
    Method(
        name="loha",
        paper="2108.06098",
        about="LyCORIS LoHa: the elementwise product of two low-rank matrices, with a rank of r * r at the size of 2 "
        "r. For styles that change everything a little; slower.",
        settings={"adapter": {"kind": "loha"}},
    ),
    Method(
        name="lokr",
        paper="2309.14859",
        about="LyCORIS LoKr: the Kronecker product of a small matrix and a low-rank one. Very small files; needs a "
        "high learning rate.",
        settings={"adapter": {"kind": "lokr"}},
        rate=6.0,
    ),
    Method(
        name="vera",
        paper="2310.11454",
        about="Two random frozen factors that all modules share, and two trained vectors per module. Few parameters, "
        "so the base forgets little; needs a high rank and a high learning rate. Saved as plain LoRA.",
        settings={"adapter": {"kind": "vera", "rank": 64}},
        rate=60.0,
    ),
    Method(
        name="adalora",
        paper="2303.10512",
        about="LoRA in the form of an SVD whose least important directions are pruned, so that ranks go to the modules "
        "that need them. For small files, and to see which blocks matter; saved as plain LoRA of mixed ranks.",
        settings={"adapter": {"kind": "adalora"}},
        rate=3.0,
    ),
    Method(
        name="dylora",
        paper="2210.07558",
        about="All ranks up to the given one are trained together, so that the file can be truncated to any lower rank "
        "(`resize --first`). One run instead of a search for the rank; learns more slowly.",
        settings={"adapter": {"kind": "dylora"}},
        rate=2.0,
    ),
    Method(
        name="pissa",
        paper="2404.02948",
        about="LoRA that is initialized with the main singular directions of the base's weights. Converges faster for "
        "large changes; the file has twice the rank, so that it applies to the unchanged base.",
        settings={
            "adapter": {"init_weights": "pissa", "unet_target_modules": ["attention", "feed-forward", "projections"]}
        },
        rate=0.3,
    ),
    Method(
        name="orthogonal",
        paper="2507.05964",
        about="LoRA whose down factor is initialized with orthogonal rows, so that no two directions are the same.",
        settings={"adapter": {"init_weights": "orthogonal"}},
    ),
    Method(
        name="sparse",
        paper="2311.11696",
        about="LoRA whose weakest directions over all modules are pruned during training, by gates with an L1 penalty. "
        "Smaller files than LoRA of the same rank.",
        settings={"adapter": {"kind": "sparse", "sparse_keep": 0.5}},
    ),
    Method(
        name="t-lora",
        paper="2507.05964",
        about="LoRA with a low rank at noisy timesteps, where the layout is decided, and the full rank at the last "
        "ones. For a subject with few images, whose layout would otherwise be copied. Because it depends on the "
        "timestep, it works for generating, but cannot be merged, combined or converted.",
        settings={"adapter": {"kind": "t-lora", "init_weights": "orthogonal", "text_encoder_target_modules": []}},
        rate=4.0,
    ),
    Method(
        name="qlora",
        paper="2305.14314",
        about="LoRA on a base with linear layers quantized to 4 bits, for GPUs with little memory. Steps are slower "
        "and see a slightly less precise base; the file is plain LoRA and works with the unquantized base.",
        settings={"compute": {"quantize": "nf4"}},
    ),
    Method(
        name="b-lora",
        paper="2403.14572",
        about="LoRA on two attention modules of SDXL's deepest up block only: one learns the content, the other the "
        "style. Train both, and use one with the block presets BLORA-CONTENT and BLORA-STYLE (`lbw=BLORA-STYLE`). The "
        "paper shows this for SDXL; on other bases the corresponding modules are trained.",
        settings={
            "adapter": {"unet_target_modules": ["b-lora-content", "b-lora-style"], "text_encoder_target_modules": []}
        },
    ),
    Method(
        name="textual-inversion",
        paper="2208.01618",
        about="Only the embedding vectors of a new token are trained; the file has a few kilobytes. Learns what the "
        "base can draw already, and no more.",
        settings={"textual_inversion": {"placeholder_tokens": ["sks"], "num_vectors": 4, "start_adapter_at": 1.0}},
        rate=2.0,
    ),
    Method(
        name="pivotal",
        paper="2106.05744",
        about="Pivotal tuning: textual inversion first, then LoRA with the learned token. For subjects whose word "
        "means something else to the base.",
        settings={"textual_inversion": {"placeholder_tokens": ["sks"], "start_adapter_at": 0.3}},
    ),
    Method(
        name="slider",
        paper="2311.12092",
        about="Concept slider: an attribute learned from a pair of prompts, which weight 1 adds and weight -1 removes. "
        "The images only provide noisy inputs, so any will do.",
        settings={
            "slider": {"positive": "a house at night", "negative": "a house at noon", "target": "a house"},
            "adapter": {"text_encoder_target_modules": []},
        },
    ),
    Method(
        name="mixed",
        paper="2106.09685, section 7",
        about="LoRA, and a few modules trained in full and saved as differences, such as norms or the first "
        "convolution. For changes that no low rank expresses, such as a shift of all colors.",
        settings={"adapter": {"modules_to_save": ["unet.conv_in", "unet.*.norm1"]}},
    ),
)
"""All methods, in the order in which they are listed."""


def with_method(table: Mapping[str, Any], chosen: Method) -> dict[str, Any]:
    """Return the table of a training config with the settings of a method, and learning rates that suit it."""
    optimizer: Mapping[str, Any] = table.get("optimizer", {})
    rates = {"learning_rate": optimizer.get("learning_rate", 1e-4)}
    if "textual_inversion" in chosen.settings:
        rates["embedding_learning_rate"] = optimizer.get("embedding_learning_rate", 5e-3)
    suited = {"optimizer": {key: value * chosen.rate for key, value in rates.items()}}
    return deep_merge(deep_merge(dict(table), suited), chosen.settings)
