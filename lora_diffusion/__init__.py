"""lora_diffusion: train, blend and merge LoRA adapters for Stable Diffusion.

    from lora_diffusion import Blend, GenerateConfig, WeightedAdapter, generate, load_adapter, load_base

Importing the package imports no heavy library; each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_diffusion.adapter import Adapter as Adapter
    from lora_diffusion.adapter import AdapterMetadata as AdapterMetadata
    from lora_diffusion.adapter import adapter_hash as adapter_hash
    from lora_diffusion.algebra.combine import combine as combine
    from lora_diffusion.blend import Blend as Blend
    from lora_diffusion.blend import WeightedAdapter as WeightedAdapter
    from lora_diffusion.branching import branched as branched
    from lora_diffusion.config import GenerateConfig as GenerateConfig
    from lora_diffusion.conversion import Conversion as Conversion
    from lora_diffusion.conversion import convert as convert
    from lora_diffusion.errors import LoRADiffusionError as LoRADiffusionError
    from lora_diffusion.formats.native import save_adapter as save_adapter
    from lora_diffusion.formats.reading import load_adapter as load_adapter
    from lora_diffusion.formats.reading import outline_adapter as outline_adapter
    from lora_diffusion.inspection import inspect_adapter as inspect_adapter
    from lora_diffusion.layers import DoRALayer as DoRALayer
    from lora_diffusion.layers import FullLayer as FullLayer
    from lora_diffusion.layers import LoHaLayer as LoHaLayer
    from lora_diffusion.layers import LoKrLayer as LoKrLayer
    from lora_diffusion.layers import LoRALayer as LoRALayer
    from lora_diffusion.library import find as find
    from lora_diffusion.library import open_library as open_library
    from lora_diffusion.merging import merge as merge
    from lora_diffusion.models import Base as Base
    from lora_diffusion.models import load_base as load_base
    from lora_diffusion.patching import blended as blended
    from lora_diffusion.preset import BlendPreset as BlendPreset
    from lora_diffusion.preset import BlendWeight as BlendWeight
    from lora_diffusion.preset import Composition as Composition
    from lora_diffusion.preset import Region as Region
    from lora_diffusion.preset import Schedule as Schedule
    from lora_diffusion.sampling import generate as generate
    from lora_diffusion.train_config import TrainConfig as TrainConfig
    from lora_diffusion.training.loop import train as train
    from lora_diffusion.verification import verify as verify
    from lora_diffusion.weights import Moment as Moment

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "Base",
    "Blend",
    "BlendPreset",
    "BlendWeight",
    "Composition",
    "Conversion",
    "DoRALayer",
    "FullLayer",
    "GenerateConfig",
    "LoHaLayer",
    "LoKrLayer",
    "LoRADiffusionError",
    "LoRALayer",
    "Moment",
    "Region",
    "Schedule",
    "TrainConfig",
    "WeightedAdapter",
    "adapter_hash",
    "blended",
    "branched",
    "combine",
    "convert",
    "find",
    "generate",
    "inspect_adapter",
    "load_adapter",
    "load_base",
    "merge",
    "open_library",
    "outline_adapter",
    "save_adapter",
    "train",
    "verify",
]

HOMES = {
    "Adapter": "adapter",
    "AdapterMetadata": "adapter",
    "Base": "models",
    "Blend": "blend",
    "BlendPreset": "preset",
    "BlendWeight": "preset",
    "Composition": "preset",
    "Conversion": "conversion",
    "DoRALayer": "layers",
    "FullLayer": "layers",
    "GenerateConfig": "config",
    "LoHaLayer": "layers",
    "LoKrLayer": "layers",
    "LoRADiffusionError": "errors",
    "LoRALayer": "layers",
    "Moment": "weights",
    "Region": "preset",
    "Schedule": "preset",
    "TrainConfig": "train_config",
    "WeightedAdapter": "blend",
    "adapter_hash": "adapter",
    "blended": "patching",
    "branched": "branching",
    "combine": "algebra.combine",
    "convert": "conversion",
    "find": "library",
    "generate": "sampling",
    "inspect_adapter": "inspection",
    "load_adapter": "formats.reading",
    "load_base": "models",
    "merge": "merging",
    "open_library": "library",
    "outline_adapter": "formats.reading",
    "save_adapter": "formats.native",
    "train": "training.loop",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'lora_diffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_diffusion.{HOMES[name]}"), name)
