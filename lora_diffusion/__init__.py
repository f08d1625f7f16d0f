"""Train, blend and merge LoRA adapters for Stable Diffusion.

    from lora_diffusion import Blend, GenerateConfig, generate, load_adapter, load_base

`__init__.pyi` lists all public names and the modules that define them. Each name is imported when it is first used, so
importing the package imports no heavy library.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import lazy_loader  # pyright: ignore[reportMissingTypeStubs]

_Exports: TypeAlias = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]
_load_name, _, __all__ = cast("_Exports", lazy_loader.attach_stub(__name__, __file__))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lora-diffusion")
    try:
        return _load_name(name)
    except AttributeError as error:
        if name in __all__:  # an error inside the module that defines the name
            raise
        raise AttributeError(f"module 'lora_diffusion' has no attribute {name!r}", name=name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
