"""Model cards for the Hugging Face Hub."""

import json

from lora_diffusion.adapters.adapter import Adapter, adapter_hash
from lora_diffusion.architectures.families import family_title
from lora_diffusion.core.templates import render_template

_HUB_BASES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def format_hub_card(adapter: Adapter, file_name: str) -> str:
    """Format the model card of an adapter in Markdown.

    The front matter has the base model, the trigger words as instance prompt and widget, and tags.

    Args:
        adapter: The adapter.
        file_name: Name of its weight file on the Hub.
    """
    metadata = adapter.metadata
    trigger = ", ".join(metadata.trigger_words)
    rows = {
        "kind": ", ".join(adapter.kinds),
        "for": family_title(metadata.family) or "unknown",
        "trigger words": trigger or "none",
        "parameters": f"{adapter.num_parameters:,}",
        "hash": f"`{adapter_hash(adapter)}`",
    }
    return render_template(
        "lora_diffusion.workflows",
        "hub_card.md.j2",
        title=metadata.name or file_name,
        description=metadata.description,
        base=_quote_yaml(_HUB_BASES.get(metadata.family, metadata.base_name)),
        trigger=_quote_yaml(trigger),
        rows=list(rows.items()),
        adapter_name=file_name.rsplit(".", 1)[0],
        file_name=file_name,
    )


def _quote_yaml(text: str) -> str:
    """Quote a text for YAML, of which JSON strings are a part; an empty text stays empty."""
    return json.dumps(text, ensure_ascii=False) if text else ""
