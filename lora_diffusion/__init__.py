"""Train, blend and merge LoRA adapters for Stable Diffusion.

    from lora_diffusion import Blend, GenerateConfig, WeightedAdapter, generate, load_adapter, load_base

Importing the package imports no heavy library; each public name is loaded when it is first used.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_diffusion.adapters.adapter import Adapter as Adapter
    from lora_diffusion.adapters.adapter import AdapterMetadata as AdapterMetadata
    from lora_diffusion.adapters.adapter import adapter_hash as adapter_hash
    from lora_diffusion.adapters.blend import Blend as Blend
    from lora_diffusion.adapters.blend import WeightedAdapter as WeightedAdapter
    from lora_diffusion.adapters.coefficients import DenoisingStep as DenoisingStep
    from lora_diffusion.adapters.layers import DoRALayer as DoRALayer
    from lora_diffusion.adapters.layers import FullLayer as FullLayer
    from lora_diffusion.adapters.layers import LoHaLayer as LoHaLayer
    from lora_diffusion.adapters.layers import LoKrLayer as LoKrLayer
    from lora_diffusion.adapters.layers import LoRALayer as LoRALayer
    from lora_diffusion.algebra.combine.exact_sum import combine as combine
    from lora_diffusion.config.generate import GenerateConfig as GenerateConfig
    from lora_diffusion.config.preset import BlendPreset as BlendPreset
    from lora_diffusion.config.preset import BlendWeight as BlendWeight
    from lora_diffusion.config.preset import Composition as Composition
    from lora_diffusion.config.preset import Region as Region
    from lora_diffusion.config.preset import Schedule as Schedule
    from lora_diffusion.config.train import TrainConfig as TrainConfig
    from lora_diffusion.errors import LoRADiffusionError as LoRADiffusionError
    from lora_diffusion.formats.adapters.blend import blend_adapters as blend_adapters
    from lora_diffusion.formats.adapters.load import load_adapter as load_adapter
    from lora_diffusion.formats.adapters.load import load_meta_adapter as load_meta_adapter
    from lora_diffusion.formats.adapters.native import save_adapter as save_adapter
    from lora_diffusion.inference.in_place import blended_weights as blended_weights
    from lora_diffusion.inference.parallel import parallel_blend as parallel_blend
    from lora_diffusion.inference.sampling import generate as generate
    from lora_diffusion.library.search import find_adapter as find_adapter
    from lora_diffusion.library.search import open_library as open_library
    from lora_diffusion.merging.merge import merge as merge
    from lora_diffusion.models.load import Base as Base
    from lora_diffusion.models.load import load_base as load_base
    from lora_diffusion.training.loop import train as train
    from lora_diffusion.workflows.adapters.convert import ConvertConfig as ConvertConfig
    from lora_diffusion.workflows.adapters.convert import convert as convert
    from lora_diffusion.workflows.adapters.inspect import inspect_adapter as inspect_adapter
    from lora_diffusion.workflows.adapters.verify import verify as verify

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "Base",
    "Blend",
    "BlendPreset",
    "BlendWeight",
    "Composition",
    "ConvertConfig",
    "DenoisingStep",
    "DoRALayer",
    "FullLayer",
    "GenerateConfig",
    "LoHaLayer",
    "LoKrLayer",
    "LoRADiffusionError",
    "LoRALayer",
    "Region",
    "Schedule",
    "TrainConfig",
    "WeightedAdapter",
    "adapter_hash",
    "blend_adapters",
    "blended_weights",
    "combine",
    "convert",
    "find_adapter",
    "generate",
    "inspect_adapter",
    "load_adapter",
    "load_base",
    "load_meta_adapter",
    "merge",
    "open_library",
    "parallel_blend",
    "save_adapter",
    "train",
    "verify",
]

HOMES = {
    "Adapter": "adapters.adapter",
    "AdapterMetadata": "adapters.adapter",
    "Base": "models.load",
    "Blend": "adapters.blend",
    "BlendPreset": "config.preset",
    "BlendWeight": "config.preset",
    "Composition": "config.preset",
    "ConvertConfig": "workflows.adapters.convert",
    "DoRALayer": "adapters.layers",
    "FullLayer": "adapters.layers",
    "GenerateConfig": "config.generate",
    "LoHaLayer": "adapters.layers",
    "LoKrLayer": "adapters.layers",
    "LoRADiffusionError": "errors",
    "LoRALayer": "adapters.layers",
    "DenoisingStep": "adapters.coefficients",
    "Region": "config.preset",
    "Schedule": "config.preset",
    "TrainConfig": "config.train",
    "WeightedAdapter": "adapters.blend",
    "adapter_hash": "adapters.adapter",
    "blend_adapters": "formats.adapters.blend",
    "blended_weights": "inference.in_place",
    "parallel_blend": "inference.parallel",
    "combine": "algebra.combine.exact_sum",
    "convert": "workflows.adapters.convert",
    "find_adapter": "library.search",
    "generate": "inference.sampling",
    "inspect_adapter": "workflows.adapters.inspect",
    "load_adapter": "formats.adapters.load",
    "load_base": "models.load",
    "merge": "merging.merge",
    "open_library": "library.search",
    "load_meta_adapter": "formats.adapters.load",
    "save_adapter": "formats.adapters.native",
    "train": "training.loop",
    "verify": "workflows.adapters.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lora-diffusion")
    if name not in HOMES:
        raise AttributeError(f"module 'lora_diffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_diffusion.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
