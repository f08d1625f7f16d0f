"""Identify unsupported files by their keys, to name them in error messages: other adapter kinds and other models."""

import re
from collections.abc import Iterable
from functools import lru_cache

_Table = tuple[tuple[str, str], ...]
"""Patterns of keys, and the kind of file that has such keys. The first match counts."""
_KINDS: _Table = (
    (r"\.oft_(blocks|diag|[rR]\b)|\.oft_R\.", "an OFT or BOFT adapter (orthogonal fine-tuning)"),
    (r"\.boft_[rRs]", "a BOFT adapter (butterfly orthogonal fine-tuning)"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "a GLoRA adapter"),
    (r"\.on_input$|\.ia3_l", "an (IA)3 adapter"),
    (r"\.vera_lambda|\.vblora_", "a VeRA or VB-LoRA adapter"),
    (r"\.(lora_E|ranknum)", "an AdaLoRA training checkpoint; export it as LoRA with the tool that trained it"),
    (
        r"\.(hra_u|fourierft_|randlora_|shira_|delora_|road_|miss_block|waveft_|c3a_|hira_)",
        "an adapter of another PEFT method",
    ),
    (r"\.(set_weight|reshape_weight)$", "a weight patch, which replaces weights instead of adding to them"),
    (r"\.lambda_layer$|\.(p|q)_layer\.", "a T-LoRA adapter"),
    (r"(^|\.)(to_k_custom_diffusion|to_v_custom_diffusion)", "a Custom Diffusion adapter"),
    (r"^(image_proj|ip_adapter)\.|\.to_[kv]_ip\.", "an IP-Adapter"),
    (r"motion_modules", "an AnimateDiff motion adapter"),
    (r"^(control_model|controlnet|input_hint_block)|\.lora_controlnet", "a ControlNet"),
)
_MODELS: _Table = (
    (r"double_blocks|single_blocks|single_transformer_blocks|guidance_in", "an adapter for Flux"),
    (r"joint_blocks|lora_te3_|^text_encoder_3\.", "an adapter for Stable Diffusion 3"),
    (r"^lora_prior|effnet|clip_txt_pooled_mapper", "an adapter for Stable Cascade"),
    (
        r"^(diffusion_model|transformer|lora_transformer)[._]",
        "an adapter for a transformer model (SD 3, Flux, ...)",
    ),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        "a full checkpoint, not an adapter",
    ),
    (r"^(decoder|encoder|quant_conv|post_quant_conv)\.(conv|mid|up|down|weight|bias)", "a VAE, not an adapter"),
)


def identify_kind(keys: Iterable[str]) -> str:
    """Identify an unsupported adapter kind or model by its keys.

    Returns:
        A noun phrase such as "a GLoRA adapter"; empty if unknown.
    """
    listed = list(keys)
    return _first_match(_KINDS, listed) or _first_match(_MODELS, listed)


def identify_model(keys: Iterable[str]) -> str:
    """Identify an unsupported model by the keys of its adapter.

    Returns:
        A noun phrase such as "an adapter for Flux"; empty if unknown.
    """
    return _first_match(_MODELS, keys)


def _first_match(table: _Table, keys: Iterable[str]) -> str:
    """Return the description of the first row in the table that any key matches; empty if none."""
    rows = {row for key in keys if (row := _find_row(table, key)) is not None}
    return table[min(rows)][1] if rows else ""


@lru_cache(maxsize=2**16)
def _find_row(table: _Table, key: str) -> int | None:
    """Return the first row whose pattern matches the key. Cached, because all adapters share the same keys."""
    return next((row for row, (pattern, _) in enumerate(table) if re.search(pattern, key)), None)
