"""The methods of adapting: the lines that choose each, its paper, and when to choose it.

All run in the one loop. A method is nothing but settings; what it computes is in `training/methods/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_diffusion.config.settings import deep_merge


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    name: str
    paper: str
    """On arXiv, or where else it is described."""
    about: str
    """What it does and when to choose it, in a few sentences."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a training config says to choose it, by section."""
    rate: float = 1.0
    """Factor on the rates of plain LoRA and of words, the best of those tried (`compare_methods --part rates`)."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The settings as the command line has them: `adapter.use_dora=true`."""
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
        return f"[{', '.join(map(format_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{format_toml(key)} = {format_toml(each)}' for key, each in value.items())} }}"
    return str(value)


METHODS: tuple[Method, ...] = (
    Method(
        name="lora",
        paper="2106.09685",
        about="Two small factors for each chosen module; their product is added to its weight. Begin here.",
    ),
    Method(
        name="rslora",
        paper="2312.03732",
        about="LoRA scaled by alpha over the root of the rank, so that high ranks learn as fast as low ones. For ranks "
        "of 32 and more; at a fixed rank it is LoRA with another learning rate.",
        settings={"adapter": {"use_rslora": True, "alpha": 2.0}},
    ),
    Method(
        name="lora+",
        paper="2402.12354",
        about="LoRA whose second factor, which begins at zero, learns several times faster than the first. For short "
        "runs; 4 to 16 times is common.",
        settings={"optimizer": {"loraplus_lr_ratio": 4.0}},
        rate=0.5,
    ),
    Method(
        name="lora-fa",
        paper="2308.03303",
        about="LoRA whose first factor stays as it began. Half the trained numbers, and no module's input need be kept "
        "for the backward pass, which saves memory at the price of some quality.",
        settings={"adapter": {"freeze_down": True}},
        rate=3.0,
    ),
    Method(
        name="dora",
        paper="2402.09353",
        about="A magnitude for each output beside a low-rank direction. Nearer to full fine-tuning at low ranks, and "
        "slower, as the whole weight is computed at each step; it blends by its own rule, not as a sum.",
        settings={"adapter": {"use_dora": True}},
    ),
    Method(
        name="loha",
        paper="2108.06098",
        about="The product, number by number, of two low-rank matrices: rank r * r for the size of 2 r. For styles "
        "that touch everything a little; slower.",
        settings={"adapter": {"kind": "loha"}},
    ),
    Method(
        name="lokr",
        paper="2309.14859",
        about="The Kronecker product of a small matrix and a low-rank one. Very small files; it wants a high rate.",
        settings={"adapter": {"kind": "lokr"}},
        rate=6.0,
    ),
    Method(
        name="vera",
        paper="2310.11454",
        about="One frozen random pair of factors for all modules, and two small vectors for each. Few trained numbers, "
        "so that little can be forgotten; it wants a high rank and a high rate, and its file is that of plain LoRA.",
        settings={"adapter": {"kind": "vera", "rank": 64}},
        rate=60.0,
    ),
    Method(
        name="adalora",
        paper="2303.10512",
        about="Directions with a strength of their own; a falling budget takes them from modules where they matter "
        "least. For few bytes well spent, and to see which blocks a style needs; saved as plain LoRA of mixed ranks.",
        settings={"adapter": {"kind": "adalora"}},
        rate=3.0,
    ),
    Method(
        name="dylora",
        paper="2210.07558",
        about="Nested ranks trained together, so that the file can be cut to any lower rank afterwards without loss "
        "of what was learned there. One run in place of a search for the rank; learns more slowly.",
        settings={"adapter": {"kind": "dylora"}},
        rate=2.0,
    ),
    Method(
        name="pissa",
        paper="2404.02948",
        about="LoRA that begins as the base's own main directions, which turn from there. Converges faster where the "
        "change is large; the file has twice the rank, and the base stays untouched.",
        settings={
            "adapter": {"init_weights": "pissa", "unet_target_modules": ["attention", "feed-forward", "projections"]}
        },
        rate=0.3,
    ),
    Method(
        name="orthogonal",
        paper="2507.05964",
        about="LoRA whose first factor begins with directions at right angles, so that none is spent twice.",
        settings={"adapter": {"init_weights": "orthogonal"}},
    ),
    Method(
        name="sparse",
        paper="2311.11696",
        about="LoRA whose weakest directions, over all modules, are taken away while the others learn to do without. "
        "Smaller files than LoRA of the same rank.",
        settings={"adapter": {"kind": "sparse", "sparse_keep": 0.5}},
    ),
    Method(
        name="t-lora",
        paper="2507.05964",
        about="LoRA with few directions in noise and all of them in the last steps. For a subject of few pictures, "
        "whose layout would else be copied too. It changes with the timestep: pictures are made with it like with any "
        "other, and merging, combining and other dialects refuse it by name.",
        settings={"adapter": {"kind": "t-lora", "init_weights": "orthogonal", "text_encoder_target_modules": []}},
        rate=4.0,
    ),
    Method(
        name="qlora",
        paper="2305.14314",
        about="LoRA on a base whose frozen layers are kept in four bits, for a GPU that cannot hold them whole. Each "
        "step takes longer and reads a slightly coarser base; the file is plain LoRA and fits the base in full.",
        settings={"compute": {"quantize": "nf4"}},
    ),
    Method(
        name="b-lora",
        paper="2403.14572",
        about="LoRA on two attentions of SDXL's deepest up block alone: one learns what is shown, the other how. Train "
        "both, and take either by the block presets BLORA-CONTENT and BLORA-STYLE (`lbw=BLORA-STYLE`). On other bases "
        "the same places, without the paper's promise.",
        settings={
            "adapter": {"unet_target_modules": ["b-lora-content", "b-lora-style"], "text_encoder_target_modules": []}
        },
    ),
    Method(
        name="textual-inversion",
        paper="2208.01618",
        about="Vectors of a new word alone; the base stays untouched and the file has a few kilobytes. Holds what the "
        "base can already draw, and no more.",
        settings={"textual_inversion": {"placeholder_tokens": ["sks"], "num_vectors": 4, "start_adapter_at": 1.0}},
        rate=2.0,
    ),
    Method(
        name="pivotal",
        paper="2106.05744",
        about="The word first, then LoRA around what it came to mean. For subjects whose word the base reads as "
        "something else.",
        settings={"textual_inversion": {"placeholder_tokens": ["sks"], "start_adapter_at": 0.3}},
    ),
    Method(
        name="slider",
        paper="2311.12092",
        about="A signed attribute, learned between two prompts: weight 1 adds it, -1 takes it away. Pictures only "
        "tell where it is learned, so that any will do.",
        settings={
            "slider": {"positive": "a house at night", "negative": "a house at noon", "target": "a house"},
            "adapter": {"text_encoder_target_modules": []},
        },
    ),
    Method(
        name="mixed",
        paper="2106.09685, section 7",
        about="LoRA, and a few modules in full, such as norms or the first convolution, saved as differences. For "
        "what a low rank cannot say, such as a change of all colors.",
        settings={"adapter": {"modules_to_save": ["unet.conv_in", "unet.*.norm1"]}},
    ),
)
"""In the order in which they are listed."""


def get_method(name: str) -> Method:
    """Return the method with this name. Raises KeyError if there is none."""
    return {each.name: each for each in METHODS}[name]


def with_method(table: Mapping[str, Any], chosen: Method) -> dict[str, Any]:
    """A training config's table with a method's settings and the rate that suits it."""
    told: Mapping[str, Any] = table.get("optimizer", {})
    rates = {"learning_rate": told.get("learning_rate", 1e-4)}
    if "textual_inversion" in chosen.settings:
        rates["embedding_learning_rate"] = told.get("embedding_learning_rate", 5e-3)
    suited = {"optimizer": {key: value * chosen.rate for key, value in rates.items()}}
    return deep_merge(deep_merge(dict(table), suited), chosen.settings)
