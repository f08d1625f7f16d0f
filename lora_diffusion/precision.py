"""Number types by name, and the bytes of a tensor."""

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values in row-major order, whatever the tensor's device and memory layout."""
    flat = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
