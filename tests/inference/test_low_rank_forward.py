"""The reference forward pass of a low-rank delta, compared with dense deltas and with the parallel forward pass."""

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.blend import BlendSum
from lora_diffusion.adapters.layers import LoRALayer
from lora_diffusion.inference.low_rank_forward import low_rank_forward
from lora_diffusion.inference.parallel import build_delta
from lora_diffusion.models.forward_overrides import ForwardOverrides

RANK, SCALE = 3, 0.5
MODULES = {
    "linear": lambda: nn.Linear(6, 5),
    "conv": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(6, 5, 3, dilation=2),
}


def make_case(kind: str) -> tuple[nn.Module, Tensor, LoRALayer]:
    """Make a module, an input of two samples, and a layer that fits."""
    torch.manual_seed(0)
    module = MODULES[kind]().requires_grad_(False)
    x = torch.randn(2, 4, 6) if kind == "linear" else torch.randn(2, 6, 8, 8)
    assert isinstance(module.weight, Tensor)
    shape = module.weight.shape
    layer = LoRALayer(
        down=torch.randn(RANK, *shape[1:]), up=torch.randn(5, RANK, *[1] * (len(shape) - 2)), alpha=SCALE * RANK
    )
    return module, x, layer


def forward_with_delta(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """Compute the module's output with a dense delta added to its weight."""
    assert isinstance(module.weight, Tensor)
    return torch.func.functional_call(module, {"weight": module.weight + delta}, (x,))


@pytest.mark.parametrize("kind", MODULES)
def test_it_equals_the_dense_delta(kind: str) -> None:
    module, x, layer = make_case(kind)
    found = module(x) + low_rank_forward(module, x, layer.down, layer.up, scale=SCALE)
    torch.testing.assert_close(found, forward_with_delta(module, x, layer.delta()))


@pytest.mark.parametrize("kind", MODULES)
def test_gates_scale_the_directions_of_each_sample(kind: str) -> None:
    module, x, layer = make_case(kind)
    gates = torch.rand(2, RANK)
    found = module(x) + low_rank_forward(module, x, layer.down, layer.up, rank_gates=gates)
    for row in range(2):
        gated = LoRALayer(
            down=layer.down * gates[row].view(-1, *[1] * (layer.down.ndim - 1)), up=layer.up, alpha=float(RANK)
        )
        wanted = forward_with_delta(module, x[row : row + 1], gated.delta())
        torch.testing.assert_close(found[row : row + 1], wanted)


@pytest.mark.parametrize("kind", MODULES)
def test_the_parallel_forward_pass_agrees_with_it(kind: str) -> None:
    module, x, layer = make_case(kind)
    wanted = module(x) + low_rank_forward(module, x, layer.down, layer.up, scale=SCALE)
    delta = build_delta(module, "m", [BlendSum(layers={"m": ((1.0, layer),)}, biases={})])
    with torch.no_grad():
        torch.testing.assert_close(delta.add_to(x, module(x)), wanted)


def test_overrides_are_restored_in_reverse_order() -> None:
    module, x, _ = make_case("linear")
    wanted, forwards = module(x), ForwardOverrides()
    forwards.add(module, lambda x: x[..., :5])
    forwards.add(module, lambda x: 2 * x[..., :5])
    torch.testing.assert_close(module(x), wanted + 3 * x[..., :5])
    forwards.restore()
    assert "forward" not in vars(module)
    assert torch.equal(module(x), wanted)
