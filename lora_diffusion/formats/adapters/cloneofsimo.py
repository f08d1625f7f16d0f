"""The older format whose keys are positions: `unet:0:up`, `text_encoder:12:down` [github.com/cloneofsimo/lora].

A position is a module's place in the walk that found it: down blocks, up blocks, then the middle; the scale is already
in `up`. diffusers swapped two modules inside each block with release 0.15, so files of both orders exist under the same
keys; they are told apart by shape, because the feed-forward projection has eight times as many outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.architectures.detection import is_plausible
from lora_diffusion.architectures.module_paths import LAYOUTS, module_paths
from lora_diffusion.errors import AdapterFormatError
from lora_diffusion.formats.adapters.parsed import ParsedFile
from lora_diffusion.formats.adapters.textual_inversion import as_vectors, infer_component, is_vectors

if TYPE_CHECKING:
    from torch import Tensor

DIALECT = "order-keyed"
KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)$")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj",)
OLD_ORDER = (*(f"attn1.{leaf}" for leaf in ATTENTION), *FEED_FORWARD, *(f"attn2.{leaf}" for leaf in ATTENTION))
NEW_ORDER = (*(f"attn1.{leaf}" for leaf in ATTENTION), *(f"attn2.{leaf}" for leaf in ATTENTION), *FEED_FORWARD)
TEXT_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")
Pair: TypeAlias = "tuple[Tensor, Tensor]"


def can_read(keys: frozenset[str]) -> bool:
    """Whether any key is a position."""
    return any(KEY.match(key) for key in keys)


def parse_tensors(tensors: Mapping[str, Tensor], entries: Mapping[str, str], source: str) -> ParsedFile:
    """Layers by module path. Raises AdapterFormatError if positions are missing or shapes fit neither order."""
    unet, text = collect_pairs(tensors, "unet", source), collect_pairs(tensors, "text_encoder", source)
    words = {key: tensor for key, tensor in tensors.items() if entries.get(key) == "<embed>" and is_vectors(tensor)}
    if text and not unet:
        family = "sd1" if text[0][1].shape[-1] == 768 else "sd2"
    else:
        family = next((name for name in ("sd1", "sd2") if is_family_match(unet, name)), "")
    if not family:
        raise AdapterFormatError(
            f"{source}: its {len(unet)} UNet positions are not SD 1.x's or SD 2.x's in either known order; expected "
            "the attention and feed-forward projections that the original trainer chose by default"
        )
    paths = [*unet_order(unet, family), *text_order(len(text), family, source)]
    layers = {path: layer_from_pair(pair, path, source) for path, pair in zip(paths, [*unet, *text], strict=True)}
    used = {key for key in tensors if KEY.match(key)} | set(words)
    return ParsedFile(
        dialect=DIALECT,
        layers=layers,
        tokens={word: {infer_component(tensor): as_vectors(tensor)} for word, tensor in words.items()},
        unmatched=tuple(key for key in tensors if key not in used),
        family=family,
    )


def collect_pairs(tensors: Mapping[str, Tensor], component: str, source: str) -> list[Pair]:
    """(up, down) by position, without gaps."""
    numbers = sorted({int(m[2]) for key in tensors if (m := KEY.match(key)) and m[1] == component})
    found: list[Pair] = []
    for expected, number in enumerate(numbers):
        up, down = (tensors.get(f"{component}:{number}:{half}") for half in ("up", "down"))
        if number != expected or up is None or down is None:
            raise AdapterFormatError(f"{source}: {component}:{expected} is not there in full; the file is incomplete")
        found.append((up, down))
    return found


def detect_order(unet: Sequence[Pair]) -> tuple[str, ...] | None:
    """The order of each block, read off which position has the feed-forward's outputs; None if neither has."""
    rows = [up.shape[0] if up.ndim else 0 for up, _ in unet[:9]]
    if len(rows) < 9:
        return None
    return OLD_ORDER if rows[4] == 8 * rows[0] else NEW_ORDER if rows[8] == 8 * rows[0] else None


def unet_order(unet: Sequence[Pair], family: str) -> list[str]:
    """Module paths in the order of the walk; empty if the file has none or an unknown order."""
    order = detect_order(unet)
    blocks = [path.removesuffix("attn1.to_q") for path in module_paths(LAYOUTS[family]) if path.endswith(".attn1.to_q")]
    walk = [b for side in ("down_blocks", "up_blocks", "mid_block") for b in blocks if b.startswith(f"unet.{side}")]
    return [block + leaf for block in walk for leaf in order] if order else []


def is_family_match(unet: Sequence[Pair], family: str) -> bool:
    """Whether number and shapes of the pairs are those of the family's modules."""
    paths = unet_order(unet, family)
    shapes = [(up.shape[0], down.shape[-1]) for up, down in unet if up.ndim and down.ndim]
    return len(paths) == len(shapes) == len(unet) and all(map(lambda p, s: is_plausible(p, s, family), paths, shapes))


def text_order(count: int, family: str, source: str) -> list[str]:
    """Module paths of a text encoder's pairs."""
    layers = LAYOUTS[family].text_layers["text_encoder"]
    if count not in (0, 4 * layers):
        raise AdapterFormatError(f"{source}: {count} text-encoder positions; expected {4 * layers}, four in each layer")
    prefix = "text_encoder.text_model.encoder.layers"
    return [f"{prefix}.{i}.self_attn.{leaf}" for i in range(count // 4) for leaf in TEXT_ORDER]


def layer_from_pair(pair: Pair, path: str, source: str) -> LoRALayer:
    """A pair as a layer of scale 1."""
    try:
        return LoRALayer(up=pair[0], down=pair[1], alpha=float(pair[1].shape[0] if pair[1].ndim else 0))
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{source}: {path}: {error}") from None


def tensors_from_list(tensors: Sequence[object]) -> dict[str, Tensor] | None:
    """The `.pt` form, [up, down, up, down, ...], under the keys of the other; None for any other list."""
    import torch

    if not tensors or len(tensors) % 2 or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return None
    component = "text_encoder" if len(tensors) // 2 in (48, 92) else "unet"
    halves = ("up", "down")
    return {f"{component}:{i // 2}:{halves[i % 2]}": t for i, t in enumerate(tensors) if isinstance(t, torch.Tensor)}
