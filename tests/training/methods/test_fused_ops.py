"""The trained layers' own forward and backward passes, against PEFT's layers and finite differences."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.config.train import AdapterConfig
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
    """The same layer with the same factors: ours, and PEFT's."""
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
    """Output and gradients of input, down and up, for a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    gradients = torch.autograd.grad((y.float() * weights).sum(), (x, *factors))
    return [y.detach(), *gradients]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODULES)
def test_output_and_gradients_are_pefts(kind: str, autocast: bool) -> None:
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
def test_dropout_is_pefts_draw_for_draw(kind: str) -> None:
    ours, theirs = both(kind, dropout=0.4)
    x = input_for(ours)
    torch.manual_seed(5)
    found = ours(x)
    torch.manual_seed(5)
    assert torch.allclose(found, theirs(x), atol=1e-5)
    assert not torch.allclose(ours.eval()(x), found, atol=1e-3)


def test_gradients_are_those_of_finite_differences() -> None:
    def doubled(*shape: int, learns: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=learns)

    torch.manual_seed(0)
    linear = (doubled(3, 4), doubled(5, 4, learns=False), doubled(5, learns=False), doubled(2, 4), doubled(5, 2), 1.5)
    assert torch.autograd.gradcheck(LowRankLinear.apply, linear)
    kernel = (
        doubled(3, 4, 3, 3, learns=False),
        doubled(3, learns=False),
        doubled(2, 4, 3, 3),
        doubled(3, 2, 1, 1),
        1.5,
    )
    assert torch.autograd.gradcheck(LowRankConvolution.apply, (doubled(1, 4, 5, 5), *kernel, (2, 2), (1, 1), (1, 1)))


def test_checkpointing_gives_the_same_gradients() -> None:
    ours, _ = both("linear")
    x = input_for(ours).requires_grad_()
    factors = (ours.update.down, ours.update.up)
    plain = torch.autograd.grad(ours(x).square().sum(), factors)
    again = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False).square().sum(), factors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's compiler has its own
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_compiler_takes_the_layers_whole(kind: str) -> None:
    """One graph, without a break, and the same gradients; the backend only traces, as generating code takes minutes."""
    ours, _ = both(kind)
    x, factors = input_for(ours), (ours.update.down, ours.update.up)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(passed(compiled, x, factors), passed(ours, x, factors), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    ours, _ = both("linear")
    ours(input_for(ours)).sum().backward()
    assert ours.update.up.grad is not None


def test_where_a_module_starts_depends_on_seed_and_path_alone(sd_folder: object) -> None:
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
