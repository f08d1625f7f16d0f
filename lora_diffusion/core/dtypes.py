"""Number types by name, and the bytes of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT_TYPES = ("float32", "float16", "bfloat16")
"""The types that weights are written in."""


def torch_dtype(name: str) -> torch.dtype:
    """torch.float32 for `float32`. Raises KeyError for a name that is no type."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise KeyError(name)
    return dtype


def dtype_name(dtype: torch.dtype | str) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values in row-major order, whatever the tensor's device and memory layout; copied only if it needs to be."""
    import torch

    flat = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().data
