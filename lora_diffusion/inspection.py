"""What is in an adapter file, as plain values."""

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from lora_diffusion.adapter import Adapter, LoRALayer, adapter_hash
from lora_diffusion.families import family_title
from lora_diffusion.formats.native import load_adapter


def inspect_adapter(path: Path) -> dict[str, Any]:
    """Family, sizes, strength, triggers and record of an adapter file, ready for JSON. Raises AdapterFormatError."""
    adapter = load_adapter(path)
    metadata = adapter.metadata
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "name": metadata.name,
        "kind": "LoRA",
        "format": metadata.source_format,
        "family": family_title(metadata.family) or "unknown",
        "base": metadata.base_name,
        "base_hash": metadata.base_hash,
        "hash": adapter_hash(adapter),
        "trigger_words": list(metadata.trigger_words),
        "parameters": adapter.num_parameters,
        "precision": sorted({str(x.down.dtype).removeprefix("torch.") for x in adapter.layers.values()}),
        "ranks": count_values(layer.rank for layer in adapter.layers.values()),
        "alphas": count_values(layer.alpha for layer in adapter.layers.values()),
        "components": {component: component_summary(adapter, component) for component in adapter.components},
        "training": dict(metadata.training),
        "created": metadata.created,
    }


def count_values(values: Any) -> dict[str, int]:
    """How many layers have each value."""
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def component_summary(adapter: Adapter, component: str) -> dict[str, float]:
    """Number of layers and the norms of their deltas."""
    norms = [delta_norm(x) for path, x in adapter.layers.items() if path.startswith(f"{component}.")]
    return {
        "layers": len(norms),
        "median_delta_norm": round(median(norms), 6),
        "max_delta_norm": round(max(norms), 6),
    }


def delta_norm(layer: LoRALayer) -> float:
    """Frobenius norm of the delta, from the rank x rank Gram matrices of its factors."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    return abs(layer.scale) * float(squared.sqrt())


def describe_inspection(facts: dict[str, Any]) -> str:
    """The facts as aligned lines of text."""
    lines: list[str] = []
    for key, value in facts.items():
        if key == "components":
            for name, summary in value.items():
                text = (
                    f"{summary['layers']} layers, delta norm {summary['median_delta_norm']:.4g} in the middle, "
                    f"{summary['max_delta_norm']:.4g} at most"
                )
                lines.append(f"{name:<16}{text}")
        elif isinstance(value, dict):
            joined = ", ".join(f"{k}: {v}" for k, v in value.items())
            lines.append(f"{key.replace('_', ' '):<16}{joined or '-'}")
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
            lines.append(f"{key.replace('_', ' '):<16}{shown if shown not in ('', None) else '-'}")
    return "\n".join(lines)
