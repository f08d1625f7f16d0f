"""DoRA, LoHa and LoKr agree with PEFT's layers; full differences and half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.adapters.layers import DoRALayer
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.models.load import load_base
from lora_diffusion.training.methods.base import AdapterSize, attach
from lora_diffusion.training.methods.injection import extract_adapter
from lora_diffusion.training.methods.loha_lokr_dora import (
    TrainableDoRA,
    TrainableFullLayer,
    TrainableLoHa,
    TrainableLoKr,
)
from lora_diffusion.training.methods.lora import TrainableLoRA
from tests.helpers.method_cases import config_of, injected, module_of


def theirs_of(module: Any, config: Any) -> Any:
    """Make a copy of a module with PEFT's adapter."""
    holder = nn.Sequential(type(module)(12, 8) if isinstance(module, nn.Linear) else nn.Conv2d(12, 8, 3, padding=1))
    holder[0].load_state_dict({name: value for name, value in module.state_dict().items() if "update" not in name})
    inject_adapter_in_model(config, holder)
    return holder[0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dora_agrees_with_peft(kind: str) -> None:
    ours = module_of(kind)
    inner = TrainableLoRA(
        ours, AdapterSize(rank=2, scale=1.5, config=AdapterConfig()), torch.Generator().manual_seed(0)
    )
    update = TrainableDoRA(ours, inner)
    theirs = theirs_of(ours, LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"]))
    attach(ours, update)
    with torch.no_grad():
        inner.up.normal_()
        update.magnitude.add_(0.1)
        theirs.lora_A["default"].weight.copy_(inner.down)
        theirs.lora_B["default"].weight.copy_(inner.up)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.copy_(update.magnitude.reshape(magnitude.shape))
    x = torch.randn(2, 12) if kind == "linear" else torch.randn(2, 12, 6, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    weights = torch.randn(ours(x).shape)
    own = torch.autograd.grad((ours(x) * weights).sum(), (inner.down, inner.up, update.magnitude))
    factors = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, magnitude
    other = torch.autograd.grad((theirs(x) * weights).sum(), factors)
    for mine, peft in zip(own, other, strict=True):
        assert torch.allclose(mine, peft.reshape(mine.shape), atol=1e-3)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_agree_with_peft(kind: str) -> None:
    ours = module_of("linear")
    size = AdapterSize(rank=2, scale=1.5, config=AdapterConfig(kind="lokr", decompose_factor=4))
    if kind == "loha":
        update: Any = TrainableLoHa(ours, size, torch.Generator().manual_seed(0))
        theirs = theirs_of(ours, LoHaConfig(r=2, alpha=3, target_modules=["0"], init_weights=False))
        names = {"w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b"}
    else:
        update = TrainableLoKr(ours, AdapterSize(rank=1, scale=1.5, config=size.config), torch.Generator())
        theirs = theirs_of(
            ours, LoKrConfig(r=1, alpha=1.5, decompose_factor=4, target_modules=["0"], init_weights=False)
        )
        names = {"w1": "lokr_w1", "w2_a": "lokr_w2_a", "w2_b": "lokr_w2_b", "w2": "lokr_w2"}
    attach(ours, update)
    with torch.no_grad():
        for mine, peft in names.items():
            own, other = getattr(update, mine), getattr(theirs, peft, None)
            if own is not None and other is not None:
                own.normal_()
                other["default"].copy_(own)
    x = torch.randn(3, 12)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_small_deltas_are_applied_in_half_precision() -> None:
    """A delta of a thousandth of the weight is at most half a unit in the last place of bfloat16."""
    module = nn.Linear(256, 64, dtype=torch.bfloat16).requires_grad_(False)
    update = TrainableLoHa(
        module, AdapterSize(rank=2, scale=1e-3, config=AdapterConfig()), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        update.w2_a.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(2))
    delta = update.layer().delta().detach()
    exact = x @ delta.T
    assert float(delta.norm()) < 0.01 * float(module.weight.float().norm())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        added = update.forward_delta(module, x.bfloat16()).float()
    rounded = x.bfloat16().float() @ delta.bfloat16().float().T  # the best result that half precision allows
    assert float((added - rounded).norm()) < 3e-3 * float(exact.norm())
    assert float((rounded - exact).norm()) < 0.01 * float(exact.norm())


def test_small_differences_of_norms_are_applied_in_half_precision() -> None:
    module = nn.GroupNorm(2, 8, dtype=torch.bfloat16).requires_grad_(False)
    update = TrainableFullLayer(module)
    attach(module, update)
    x = torch.randn(2, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = module(x).float()
        update.diff.fill_(1e-3)
        assert torch.allclose(module(x).float(), before * 1.001, rtol=1e-4, atol=1e-6)


def test_magnitudes_are_saved_in_float32(sd_folder: Path) -> None:
    """Rounded magnitudes would change the base weight itself."""
    base = load_base(str(sd_folder))
    paths, _ = injected(base, config_of("dora"))
    layer = extract_adapter(base, paths, AdapterMetadata(), torch.float16).layers[paths[0]]
    assert isinstance(layer, DoRALayer)
    assert layer.magnitude.dtype == torch.float32
    assert {factor.dtype for factor in layer.inner.factors.values()} == {torch.float16}
