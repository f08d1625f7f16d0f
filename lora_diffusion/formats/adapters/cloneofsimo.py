"""Read cloneofsimo's LoRA files, whose keys are module positions: `unet:0:up`, `text_encoder:12:down`.

A position is the index of a module when the model is traversed: down blocks, up blocks, then the mid block. The scale
is already multiplied into `up`. diffusers 0.15 swapped two modules inside each transformer block, so files in both
orders exist with the same keys. The feed-forward projection tells the orders apart, because it has eight times as many
outputs as the attention projections [github.com/cloneofsimo/lora].
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
"""Name of this format in `AdapterMetadata.source_format`."""
_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)$")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj",)
OLD_ORDER = (*(f"attn1.{leaf}" for leaf in _ATTENTION), *_FEED_FORWARD, *(f"attn2.{leaf}" for leaf in _ATTENTION))
"""Modules of a transformer block in the order of diffusers up to 0.14."""
NEW_ORDER = (*(f"attn1.{leaf}" for leaf in _ATTENTION), *(f"attn2.{leaf}" for leaf in _ATTENTION), *_FEED_FORWARD)
"""Modules of a transformer block in the order of diffusers from 0.15 on."""
TEXT_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")
"""Modules of a text-encoder layer in file order."""
_Pair: TypeAlias = "tuple[Tensor, Tensor]"


def can_read(keys: frozenset[str]) -> bool:
    """Return whether any key is a module position."""
    return any(_KEY.match(key) for key in keys)


def parse_tensors(tensors: Mapping[str, Tensor], entries: Mapping[str, str], source: str) -> ParsedFile:
    """Parse the tensors of a file into layers by module path.

    Args:
        tensors: Tensors of the file, by key.
        entries: Metadata of the file; the value `<embed>` marks the key of a textual-inversion embedding.
        source: The path of the file, for error messages.

    Raises:
        AdapterFormatError: If a position is missing, or the shapes match neither module order.
    """
    unet, text = _collect_pairs(tensors, "unet", source), _collect_pairs(tensors, "text_encoder", source)
    tokens = {key: tensor for key, tensor in tensors.items() if entries.get(key) == "<embed>" and is_vectors(tensor)}
    if text and not unet:
        family = "sd1" if text[0][1].shape[-1] == 768 else "sd2"
    else:
        family = next((name for name in ("sd1", "sd2") if _is_family_match(unet, name)), "")
    if not family:
        raise AdapterFormatError(
            f"{source}: its {len(unet)} UNet positions do not match SD 1.x or SD 2.x in either known order; expected "
            "the attention and feed-forward projections, which cloneofsimo's trainer targets by default"
        )
    paths = [*_unet_order(unet, family), *_text_order(len(text), family, source)]
    layers = {path: _layer_from_pair(pair, path, source) for path, pair in zip(paths, [*unet, *text], strict=True)}
    used = {key for key in tensors if _KEY.match(key)} | set(tokens)
    return ParsedFile(
        dialect=DIALECT,
        layers=layers,
        tokens={token: {infer_component(vectors): as_vectors(vectors)} for token, vectors in tokens.items()},
        unmatched=tuple(key for key in tensors if key not in used),
        family=family,
    )


def _collect_pairs(tensors: Mapping[str, Tensor], component: str, source: str) -> list[_Pair]:
    """Return the (up, down) pairs in the order of their positions, which must have no gaps."""
    numbers = sorted({int(m[2]) for key in tensors if (m := _KEY.match(key)) and m[1] == component})
    pairs: list[_Pair] = []
    for expected, number in enumerate(numbers):
        up, down = (tensors.get(f"{component}:{number}:{half}") for half in ("up", "down"))
        if number != expected or up is None or down is None:
            raise AdapterFormatError(
                f"{source}: the up or down tensor of {component}:{expected} is missing; the file is incomplete"
            )
        pairs.append((up, down))
    return pairs


def _detect_order(unet: Sequence[_Pair]) -> tuple[str, ...] | None:
    """Return the module order in each block, by the position of the feed-forward projection; None if unknown."""
    rows = [up.shape[0] if up.ndim else 0 for up, _ in unet[:9]]
    if len(rows) < 9:
        return None
    return OLD_ORDER if rows[4] == 8 * rows[0] else NEW_ORDER if rows[8] == 8 * rows[0] else None


def _unet_order(unet: Sequence[_Pair], family: str) -> list[str]:
    """Return the module paths by position; empty if the module order is unknown."""
    order = _detect_order(unet)
    blocks = [path.removesuffix("attn1.to_q") for path in module_paths(LAYOUTS[family]) if path.endswith(".attn1.to_q")]
    traversal = [
        block
        for side in ("down_blocks", "up_blocks", "mid_block")
        for block in blocks
        if block.startswith(f"unet.{side}")
    ]
    return [block + leaf for block in traversal for leaf in order] if order else []


def _is_family_match(unet: Sequence[_Pair], family: str) -> bool:
    """Return whether the number and shapes of the pairs match the family's modules."""
    paths = _unet_order(unet, family)
    shapes = [(up.shape[0], down.shape[-1]) for up, down in unet if up.ndim and down.ndim]
    return len(paths) == len(shapes) == len(unet) and all(map(lambda p, s: is_plausible(p, s, family), paths, shapes))


def _text_order(count: int, family: str, source: str) -> list[str]:
    """Return the module paths of `count` text-encoder positions."""
    layers = LAYOUTS[family].text_layers["text_encoder"]
    if count not in (0, 4 * layers):
        raise AdapterFormatError(f"{source}: has {count} text-encoder positions; expected {4 * layers}, four per layer")
    prefix = "text_encoder.text_model.encoder.layers"
    return [f"{prefix}.{i}.self_attn.{leaf}" for i in range(count // 4) for leaf in TEXT_ORDER]


def _layer_from_pair(pair: _Pair, path: str, source: str) -> LoRALayer:
    """Make a layer with scale 1."""
    try:
        return LoRALayer(up=pair[0], down=pair[1], alpha=float(pair[1].shape[0] if pair[1].ndim else 0))
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{source}: {path}: {error}") from None


def tensors_from_list(tensors: Sequence[object]) -> dict[str, Tensor] | None:
    """Convert the list in a `.pt` file, [up, down, up, down, ...], to tensors by position key.

    Returns:
        The tensors, or None if the list has another form.
    """
    import torch

    if not tensors or len(tensors) % 2 or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return None
    component = "text_encoder" if len(tensors) // 2 in (48, 92) else "unet"
    halves = ("up", "down")
    return {f"{component}:{i // 2}:{halves[i % 2]}": t for i, t in enumerate(tensors) if isinstance(t, torch.Tensor)}
