"""A model card for the Hugging Face Hub: what an adapter is, as its page's front matter and text."""

import json

from lora_diffusion.adapters.adapter import Adapter, adapter_hash
from lora_diffusion.architectures.families import family_title

_HUB_BASES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def format_hub_card(adapter: Adapter, file_name: str) -> str:
    """Format a model card with the Hub's front matter: base model, instance prompt, widget and tags."""
    metadata = adapter.metadata
    trigger = ", ".join(metadata.trigger_words)
    base = _HUB_BASES.get(metadata.family, metadata.base_name)
    front = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    front += [f"base_model: {_quote_yaml(base)}"] if base else []
    front += (
        [f"instance_prompt: {_quote_yaml(trigger)}", "widget:", f"  - text: {_quote_yaml(trigger)}"] if trigger else []
    )
    front += ["tags:", "  - lora", "  - diffusers", "  - text-to-image"]
    front += ["  - template:sd-lora"] if trigger else []
    rows = {
        "kind": ", ".join(adapter.kinds),
        "for": family_title(metadata.family) or "unknown",
        "trigger words": trigger or "none",
        "parameters": f"{adapter.num_parameters:,}",
        "hash": f"`{adapter_hash(adapter)}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    about = f"{metadata.description}\n\n" if metadata.description else ""
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {metadata.name or file_name}\n\n{about}| | |\n|---|---|\n{table}\n\n"
        f'```python\npipe.load_lora_weights("{file_name.rsplit(".", 1)[0]}", weight_name="{file_name}")\n```\n'
    )


def _quote_yaml(text: str) -> str:
    """Quote a text for YAML, which reads JSON strings."""
    return json.dumps(text, ensure_ascii=False)
