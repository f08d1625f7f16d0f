"""Adapters that are recognized, named and refused: kinds that are not done here, and other models' adapters."""

import re
from collections.abc import Iterable
from functools import lru_cache

Table = tuple[tuple[str, str], ...]
"""Patterns of keys, and what they are keys of."""
KINDS: Table = (
    (r"\.oft_(blocks|diag|[rR]\b)|\.oft_R\.", "an OFT or BOFT adapter (orthogonal fine-tuning)"),
    (r"\.boft_[rRs]", "a BOFT adapter (butterfly orthogonal fine-tuning)"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "a GLoRA adapter"),
    (r"\.on_input$|\.ia3_l", "an (IA)3 adapter"),
    (r"\.vera_lambda|\.vblora_", "a VeRA or VB-LoRA adapter, whose shared factors are not in one module"),
    (r"\.(lora_E|ranknum)", "an unfinished AdaLoRA adapter; export it as LoRA from the tool that trained it"),
    (r"\.(hra_u|fourierft_|randlora_|shira_|delora_|road_|miss_block|waveft_|c3a_|hira_)", "one of PEFT's other kinds"),
    (r"\.(set_weight|reshape_weight)$", "a patch that replaces weights instead of adding to them"),
    (r"\.lambda_layer$|\.(p|q)_layer\.", "a T-LoRA adapter"),
    (r"(^|\.)(to_k_custom_diffusion|to_v_custom_diffusion)", "a Custom Diffusion adapter"),
    (r"^(image_proj|ip_adapter)\.|\.to_[kv]_ip\.", "an IP-Adapter"),
    (r"motion_modules", "an AnimateDiff motion adapter"),
    (r"^(control_model|controlnet|input_hint_block)|\.lora_controlnet", "a ControlNet"),
)
MODELS: Table = (
    (r"double_blocks|single_blocks|single_transformer_blocks|guidance_in", "an adapter for Flux"),
    (r"joint_blocks|lora_te3_|^text_encoder_3\.", "an adapter for Stable Diffusion 3"),
    (r"^lora_prior|effnet|clip_txt_pooled_mapper", "an adapter for Stable Cascade"),
    (
        r"^(diffusion_model|transformer|lora_transformer)[._]",
        "an adapter for a transformer model (SD 3, Flux, ...)",
    ),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "a whole checkpoint, no adapter"),
    (r"^(decoder|encoder|quant_conv|post_quant_conv)\.(conv|mid|up|down|weight|bias)", "an autoencoder, no adapter"),
)


def identify_kind(keys: Iterable[str]) -> str:
    """What other kind or model the keys speak of; empty if nothing known."""
    listed = list(keys)
    return first_match(KINDS, listed) or first_match(MODELS, listed)


def identify_model(keys: Iterable[str]) -> str:
    """What other model the keys speak of; empty if none."""
    return first_match(MODELS, keys)


def first_match(table: Table, keys: Iterable[str]) -> str:
    """The name that stands first in the table of those that the keys speak of."""
    rows = {row for key in keys if (row := find_row(table, key)) is not None}
    return table[min(rows)][1] if rows else ""


@lru_cache(maxsize=2**16)
def find_row(table: Table, key: str) -> int | None:
    """The first row whose pattern is found in the key. The same keys come with every adapter."""
    return next((row for row, (pattern, _) in enumerate(table) if re.search(pattern, key)), None)
