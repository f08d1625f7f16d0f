"""Fused forward and backward passes, compared with PEFT's layers and finite differences."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.config.train import AdapterConfig
from lora_diffusion.inference.low_rank_forward import low_rank_forward
from lora_diffusion.training.methods.base import AdapterSize, attach
from lora_diffusion.training.methods.fused_ops import LowRankConvolution, LowRankLinear
from lora_diffusion.training.methods.lora import TrainableLoRA

MODULES = {
    "linear": lambda: nn.Linear(6, 5),
    "no-bias": lambda: nn.Linear(6, 5, bias=False),
    "conv": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "one": lambda: nn.Conv2d(6, 5, 1),
}


def input_for(module: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 6) if isinstance(module, nn.Linear) else torch.randn(2, 6, 7, 7)


def both(kind: str, dropout: float = 0.0) -> tuple[Any, Any]:
    """Make our layer and PEFT's with the same weights and factors."""
    torch.manual_seed(0)
    ours: Any = MODULES[kind]().requires_grad_(False)
    holder = nn.Sequential(MODULES[kind]())
    holder[0].load_state_dict(ours.state_dict())
    settings = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=["0"])
    inject_adapter_in_model(settings, holder)
    theirs: Any = holder[0]
    config = AdapterConfig(rank=2, alpha=3.0, dropout=dropout)
    update = TrainableLoRA(ours, AdapterSize(rank=2, scale=1.5, config=config), torch.Generator().manual_seed(0))
    attach(ours, update)
    with torch.no_grad():
        update.up.normal_()
        theirs.lora_A["default"].weight.copy_(update.down)
        theirs.lora_B["default"].weight.copy_(update.up)
    return ours, theirs


def passed(module: Any, x: Tensor, factors: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Compute the output and the gradients of input, down and up for a loss with a different weight per output."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    gradients = torch.autograd.grad((y.float() * weights).sum(), (x, *factors))
    return [y.detach(), *gradients]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODULES)
def test_output_and_gradients_agree_with_peft(kind: str, autocast: bool) -> None:
    ours, theirs = both(kind)
    x = input_for(ours)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = passed(ours, x, (ours.update.down, ours.update.up))
        wanted = passed(theirs, x, (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight))
    epsilon = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).float().norm() <= 8 * epsilon * other.float().norm()


@pytest.mark.parametrize("kind", MODULES)
def test_output_and_gradients_agree_with_the_reference(kind: str) -> None:
    ours, _ = both(kind)
    layer = ours.update

    def reference(x: Tensor) -> Tensor:
        return type(ours).forward(ours, x) + low_rank_forward(ours, x, layer.down, layer.up, scale=layer.scale)

    x, factors = input_for(ours), (layer.down, layer.up)
    for found, wanted in zip(passed(ours, x, factors), passed(reference, x, factors), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", MODULES)
def test_dropout_agrees_with_peft_for_the_same_seed(kind: str) -> None:
    ours, theirs = both(kind, dropout=0.4)
    x = input_for(ours)
    torch.manual_seed(5)
    found = ours(x)
    torch.manual_seed(5)
    assert torch.allclose(found, theirs(x), atol=1e-5)
    assert not torch.allclose(ours.eval()(x), found, atol=1e-3)


def test_gradients_agree_with_finite_differences() -> None:
    def draw_float64(*shape: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)

    torch.manual_seed(0)
    linear = (
        draw_float64(3, 4),
        draw_float64(5, 4, requires_grad=False),
        draw_float64(5, requires_grad=False),
        draw_float64(2, 4),
        draw_float64(5, 2),
        1.5,
    )
    assert torch.autograd.gradcheck(LowRankLinear.apply, linear)
    kernel = (
        draw_float64(3, 4, 3, 3, requires_grad=False),
        draw_float64(3, requires_grad=False),
        draw_float64(2, 4, 3, 3),
        draw_float64(3, 2, 1, 1),
        1.5,
    )
    assert torch.autograd.gradcheck(
        LowRankConvolution.apply, (draw_float64(1, 4, 5, 5), *kernel, (2, 2), (1, 1), (1, 1))
    )


def test_checkpointing_does_not_change_the_gradients() -> None:
    ours, _ = both("linear")
    x = input_for(ours).requires_grad_()
    factors = (ours.update.down, ours.update.up)
    plain = torch.autograd.grad(ours(x).square().sum(), factors)
    again = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False).square().sum(), factors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.filterwarnings("ignore")  # torch.compile emits its own warnings
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_torch_compile_gives_one_graph(kind: str) -> None:
    """No graph break and the same gradients; the backend only traces, because code generation takes minutes."""
    ours, _ = both(kind)
    x, factors = input_for(ours), (ours.update.down, ours.update.up)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(passed(compiled, x, factors), passed(ours, x, factors), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_input_without_gradient_is_supported() -> None:
    ours, _ = both("linear")
    ours(input_for(ours)).sum().backward()
    assert ours.update.up.grad is not None


def test_initial_values_depend_on_seed_and_path_alone(sd_folder: object) -> None:
    from lora_diffusion.models.load import load_base
    from lora_diffusion.training.methods.injection import inject

    def started(*leaves: str, seed: int = 0) -> dict[str, Tensor]:
        base = load_base(str(sd_folder), device=torch.device("cpu"))
        paths = [path for path in base.paths if path.endswith(leaves) and path.startswith("unet.")]
        return {name: p.detach() for name, p in inject(base, paths, AdapterConfig(rank=2), seed).parameters.items()}

    few, many, other = started("to_q"), started("to_v", "to_q"), started("to_q", seed=1)
    assert all(torch.equal(value, many[name]) for name, value in few.items())
    downs = [name for name in few if name.endswith(".down")]
    assert not any(torch.equal(few[name], other[name]) for name in downs)
    assert len({tuple(few[name].flatten()[:3].tolist()) for name in downs}) == len(downs)
