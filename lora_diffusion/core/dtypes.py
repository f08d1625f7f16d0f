"""Convert between dtypes and their names, and access the raw bytes of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT_TYPES = ("float32", "float16", "bfloat16")
"""Names of the dtypes in which weights can be saved."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, such as torch.float32 for `float32`.

    Raises:
        KeyError: If torch has no dtype of that name.
    """
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise KeyError(name)
    return dtype


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the name of a dtype, such as `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes in row-major order, whatever its device and memory format.

    The tensor is copied only if it is not already contiguous on the CPU.
    """
    import torch

    flat = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().data
