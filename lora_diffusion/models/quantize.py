"""A base whose frozen linear layers are kept in four or eight bits, to train an adapter on it or to make pictures.

This is QLoRA [arXiv:2305.14314], with the codes of bitsandbytes, on GPUs and processors alike; the constants of 4-bit
blocks are quantized once more. Layers that fit no blocks, convolutions and norms stay as they are. Nothing can be added
to quantized weights, so a blend acts in parallel to them (`inference/parallel.py`).
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lora_diffusion.config.settings import Quantization
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.load import Base, default_device, default_precision, load_base

INPUTS, OUTPUTS = 64, 32
"""A layer's inputs and outputs are multiples of these: blocks that share a constant, and the processor's kernels."""


def load_quantized_base(name: str, quantization: Quantization, *, precision: torch.dtype | None = None) -> Base:
    """Load a base for sampling, with quantized linear layers unless `quantization` is "none".

    Raises BaseModelError, ConfigError.
    """
    if quantization == "none":
        return load_base(name, precision=precision)
    check_quantization_available(quantization)
    device = default_device()
    base = load_base(name, device=torch.device("cpu"), precision=precision or default_precision(device))
    return quantize_base(base, quantization, device)


def check_quantization_available(quantization: Quantization) -> None:
    """Raise ConfigError if there is nothing that can hold them."""
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantize {quantization!r} needs bitsandbytes; pip install 'lora-diffusion[quantized]'")


def quantize_base(base: Base, quantization: Quantization, device: torch.device) -> Base:
    """Quantize the UNet's linear layers onto a device. Only quantized weights are moved there; the base is used up.

    Raises ConfigError without bitsandbytes, and for a base of which no layer can be held.
    """
    check_quantization_available(quantization)
    unet: nn.Module = base.pipe.unet
    places = [
        (parent, name, child)
        for parent in unet.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and is_quantizable(child)
    ]
    if not places:
        raise ConfigError(
            f"quantize {quantization!r}: no linear layer of {base.name} has a multiple of {INPUTS} inputs and of "
            f"{OUTPUTS} outputs, which its blocks need; set quantize to none"
        )
    for parent, name, child in places:
        setattr(parent, name, quantize_linear(child, quantization, device))
    base.pipe.to(device)
    return replace(base, quantization=quantization)


def is_quantizable(linear: nn.Linear) -> bool:
    return linear.in_features % INPUTS == 0 and linear.out_features % OUTPUTS == 0


def quantize_linear(linear: nn.Linear, quantization: Quantization, device: torch.device) -> nn.Module:
    """Quantize the weight of a linear layer onto a device."""
    import bitsandbytes

    bnb: Any = bitsandbytes.nn
    weight, shape = linear.weight.data, (linear.in_features, linear.out_features)
    plain, bias = weight.cpu().contiguous(), linear.bias is not None
    with torch.device("meta"):  # no memory for weights that are replaced at once
        if quantization == "int8":
            made: Any = bnb.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        else:
            made = bnb.Linear4bit(*shape, bias=bias, compute_dtype=weight.dtype, quant_type=quantization)
    if quantization == "int8":
        made.weight = bnb.Int8Params(plain, requires_grad=False, has_fp16_weights=False)
    else:
        made.weight = bnb.Params4bit(plain, requires_grad=False, quant_type=quantization, compress_statistics=True)
    made.bias = linear.bias
    return made.to(device)
