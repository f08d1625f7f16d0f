"""Quantize the linear layers of a base's UNet to four or eight bits, to save memory in training and sampling.

Training an adapter on a quantized base is QLoRA [arXiv:2305.14314]. The quantized layers are those of bitsandbytes, on
GPUs and CPUs alike; 4-bit types use double quantization. Convolutions, norms and linear layers whose sizes do not fit
the quantization blocks are left as they are. A delta cannot be added to a quantized weight, so a blend runs parallel to
the quantized layers (see `inference/parallel.py`).
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_diffusion.config.settings import Quantization
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.load import Base, default_device, default_precision, load_base

IN_MULTIPLE, OUT_MULTIPLE = 64, 32
"""A layer is quantized if its `in_features` and `out_features` are multiples of these.

The first is bitsandbytes' block size, the second a requirement of its CPU kernels.
"""


def load_quantized_base(
    name: str | os.PathLike[str], quantization: Quantization, *, precision: torch.dtype | None = None
) -> Base:
    """Load a base for sampling and quantize its UNet.

    Args:
        name: `tiny-sd` for the embedded base, a folder in diffusers' layout, or a hub id such as `owner/name`.
        quantization: The quantized data type, or `none` to load the base as it is.
        precision: The data type of all other weights; by default float16 on a GPU and float32 on a CPU.

    Raises:
        BaseModelError: If the base is not found, is not Stable Diffusion, or cannot be loaded.
        ConfigError: If bitsandbytes is not installed, or if no layer of the base can be quantized.
    """
    if quantization == "none":
        return load_base(name, precision=precision)
    check_quantization_available(quantization)
    device = default_device()
    base = load_base(name, device=torch.device("cpu"), precision=precision or default_precision(device))
    return quantize_base(base, quantization, device)


def check_quantization_available(quantization: Quantization) -> None:
    """Raise ConfigError if quantization is asked for and bitsandbytes is not installed."""
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantize {quantization!r} needs bitsandbytes; pip install 'lora-diffusion[quantized]'")


def quantize_base(base: Base, quantization: Quantization, device: torch.device) -> Base:
    """Quantize the linear layers of a base's UNet in place, and move the base to a device.

    The unquantized weights are never moved to the device. `base` must not be used afterwards.

    Args:
        base: The base to quantize, usually on the CPU.
        quantization: The quantized data type.
        device: Where to put the quantized base.

    Returns:
        The same pipeline as a base with `quantization` set.

    Raises:
        ConfigError: If bitsandbytes is not installed, or if no layer can be quantized.
    """
    check_quantization_available(quantization)
    unet: nn.Module = base.pipe.unet
    linears = [
        (parent, name, child)
        for parent in unet.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and is_quantizable(child)
    ]
    if not linears:
        raise ConfigError(
            f"quantize {quantization!r}: no linear layer of {base.name} can be quantized (in_features must be a "
            f"multiple of {IN_MULTIPLE} and out_features a multiple of {OUT_MULTIPLE}); set quantize to none"
        )
    for parent, name, child in linears:
        setattr(parent, name, _quantize_linear(child, quantization, device))
    cast(Any, base.pipe).to(device)
    return replace(base, quantization=quantization)


def is_quantizable(linear: nn.Linear) -> bool:
    """Return whether the sizes of a linear layer fit the quantization blocks."""
    return linear.in_features % IN_MULTIPLE == 0 and linear.out_features % OUT_MULTIPLE == 0


def _quantize_linear(linear: nn.Linear, quantization: Quantization, device: torch.device) -> nn.Module:
    """Return a quantized copy of a linear layer on a device; the bias is shared."""
    import bitsandbytes

    bnb: Any = bitsandbytes.nn
    weight, shape = linear.weight.data, (linear.in_features, linear.out_features)
    plain, bias = weight.cpu().contiguous(), cast("Tensor | None", linear.bias) is not None
    with torch.device("meta"):  # allocates nothing for weights that are replaced below
        if quantization == "int8":
            quantized: Any = bnb.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        else:
            quantized = bnb.Linear4bit(*shape, bias=bias, compute_dtype=weight.dtype, quant_type=quantization)
    if quantization == "int8":
        quantized.weight = bnb.Int8Params(plain, requires_grad=False, has_fp16_weights=False)
    else:
        quantized.weight = bnb.Params4bit(plain, requires_grad=False, quant_type=quantization, compress_statistics=True)
    quantized.bias = linear.bias
    return quantized.to(device)
