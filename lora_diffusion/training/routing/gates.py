"""Gates over frozen adapters, one for each block and stretch of the denoising steps, that a loss can reach.

    y_b = W x + sum_i weight_i * gate_i[b, stretch(t)] * scale_i * up_i (down_i x)

for every module of block b, as MoLE weighs adapters by layer [arXiv:2404.13628] and LoRA Soups with learned numbers on
concatenated factors [arXiv:2410.13025]; here by the time of the denoising too, because early steps lay out the picture
and late ones its surface. There is no softmax: a gate is a factor of the user's weight, 1 as the user has it, and what
is learned is a `BlendWeight`, which every command reads.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.factor_stack import is_joinable, stack_factors
from lora_diffusion.architectures.blocks import block_name, vector_block_names
from lora_diffusion.config.preset import BlendWeight, Schedule
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import validate_blend, weight_patch, weight_shape
from lora_diffusion.inference.parallel import Forward, ForwardOverrides, convolve_per_sample
from lora_diffusion.models.load import Base, module_at

DECIMALS = 4
"""Of a gate as it is saved; a ten-thousandth of a delta is below what any picture shows."""


class Gates(nn.Module):
    """The gates of a blend on a base, `values` (adapters, blocks, stretches) in float32, all at `start`.

    The weights of the blend are plain numbers, which the gates multiply. Blocks are those of the UNet in which some
    adapter has a layer. Text encoders (block BASE) and what lies outside all blocks (time embedding, last layer) keep
    `start` for good and are not trained: the former read the prompt once, before there is a step to tell stretches by.

    Raises FamilyMismatchError and AdapterFormatError for adapters that do not fit, ConfigError for weights and kinds of
    layer that no gate is for.
    """

    def __init__(self, base: Base, blend: Blend, *, stretches: int, start: float) -> None:
        super().__init__()
        validate_blend(base, blend)
        check_weights(blend)
        self.base, self.blend, self.start = base, blend, start
        used = {self.block_of(path) for entry in blend.entries for path in entry.adapter.paths}
        self.blocks = tuple(block for block in vector_block_names(base.layout)[0] if block in used - {"BASE"})
        check_layers(blend, self.paths)
        shape = (len(blend.entries), len(self.blocks), stretches)
        device = base.device
        self.values = nn.Parameter(torch.full(shape, start, dtype=torch.float32, device=device))
        self.num_timesteps = int(base.pipe.scheduler.config.num_train_timesteps)
        self.stretch = torch.zeros(1, dtype=torch.int64, device=device)
        """(n,): the stretch that each sample of the batch at hand is in, or (1,) that all are in."""

    def block_of(self, path: str) -> str:
        return block_name(path, self.base.layout)

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules of the UNet that have a gate, sorted."""
        found = {path for entry in self.blend.entries for path in entry.adapter.paths}
        return tuple(sorted(path for path in found if self.block_of(path) in self.blocks))

    def set_timesteps(self, timestep: Tensor) -> None:
        """Take the gates for samples at these training timesteps, (n,) or one for all, from now on."""
        self.stretch = time_bin_at(timestep, self.values.shape[2], self.num_timesteps).to(self.values.device)

    def get_block_gates(self, block: str) -> Tensor:
        """(n, adapters): the gates of one block for each sample, differentiable."""
        return self.values[:, self.blocks.index(block), self.stretch].T

    def compute_drift(self) -> Tensor:
        """Mean squared distance of the gates from their start."""
        return (self.values - self.start).square().mean()

    def to_weights(self) -> tuple[BlendWeight, ...]:
        """The adapters' weights with the gates as factors by block: a schedule that holds over each stretch."""
        return tuple(
            BlendWeight(
                value=get_weight_value(entry), blocks=self.block_factors(i, entry), modules=self.outside_factors(entry)
            )
            for i, entry in enumerate(self.blend.entries)
        )

    def to_blend(self) -> Blend:
        """The blend with these weights."""
        pairs = zip(self.blend.entries, self.to_weights(), strict=True)
        return Blend(entries=tuple(replace(entry, weight=weight) for entry, weight in pairs))

    def block_factors(self, i: int, entry: WeightedAdapter) -> dict[str, float | Schedule]:
        """By block in which this adapter has a layer."""
        here = {self.block_of(path) for path in entry.adapter.paths}
        values = self.values.detach().cpu().double()
        text: dict[str, float | Schedule] = {"BASE": self.start} if "BASE" in here else {}
        return text | {b: make_schedule(values[i, j].tolist()) for j, b in enumerate(self.blocks) if b in here}

    def outside_factors(self, entry: WeightedAdapter) -> tuple[tuple[str, float], ...]:
        """What lies outside all blocks, by module."""
        return tuple((path, self.start) for path in entry.adapter.paths if not self.block_of(path))

    def ungated_sum(self) -> Blend:
        """The part of the blend that is the same at all steps: text encoders, and what lies outside all blocks."""
        off = dict.fromkeys(self.blocks, 0.0) | {"BASE": self.start}
        return Blend(
            entries=tuple(
                replace(
                    entry,
                    weight=BlendWeight(value=get_weight_value(entry), blocks=off, modules=self.outside_factors(entry)),
                )
                for entry in self.blend.entries
            )
        )


def get_weight_value(entry: WeightedAdapter) -> float:
    assert not isinstance(entry.weight, BlendWeight)
    return float(entry.weight)


def check_weights(blend: Blend) -> None:
    """Raise ConfigError unless every adapter's weight is a plain number other than 0, and acts everywhere."""
    for entry in blend.entries:
        if isinstance(entry.weight, BlendWeight) or entry.weight == 0:
            raise ConfigError(f"{entry.name}: a gate multiplies a plain weight other than 0; give a number")
        if entry.region:
            raise ConfigError(f"{entry.name}: gates weigh adapters over the whole picture; leave the region out")


def check_layers(blend: Blend, paths: tuple[str, ...]) -> None:
    """Raise ConfigError for what a gate cannot multiply in the forward pass, or if there is nothing to multiply."""
    if not paths:
        raise ConfigError("none of the adapters has a layer in a block of the UNet; there is nothing to weigh")
    for entry in blend.entries:
        layers = [(path, entry.adapter.layers[path]) for path in paths if path in entry.adapter.layers]
        other = [(path, layer.kind) for path, layer in layers if not is_joinable(layer)]
        other += [(path, "bias") for path in paths if path in entry.adapter.biases]
        if other:
            kinds = ", ".join(sorted({"LoRA with a Tucker core" if kind == "LoRA" else kind for _, kind in other}))
            raise ConfigError(
                f"{entry.name}: gates take plain LoRA layers only, and it has {len(other)} of other kinds ({kinds}; "
                f"first: {other[0][0]}); use an adapter of plain LoRA layers"
            )


def make_schedule(gates: list[float]) -> Schedule:
    """Gates of equal stretches from the first denoising step to the last, rounded."""
    return Schedule(points=tuple((i / len(gates), round(gate, DECIMALS)) for i, gate in enumerate(gates)))


def time_bin_at(timestep: Tensor, stretches: int, num_timesteps: int) -> Tensor:
    """The stretch, from 0, in which a model trained on `num_timesteps` meets these timesteps, of any shape.

    Denoising goes from the last timestep to 0, so that timestep t has its middle at the fraction 1 - (t + 0.5) / T of a
    run, T the number of timesteps; samplers differ from that by up to half a step. (Whole numbers, so that no rounding
    decides at a border.)
    """
    doubled = 2 * (num_timesteps - timestep.long()) - 1
    return (doubled * stretches).div(2 * num_timesteps, rounding_mode="floor").clamp(0, stretches - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedFactors:
    """All adapters' factors at one module, side by side, in the type of its weight."""

    down: Tensor
    """(sum of ranks, in, ...kernel)."""
    up: Tensor
    """(out, sum of ranks), for a convolution (out, sum of ranks, 1, 1)."""
    owner: Tensor
    """(sum of ranks,): which adapter each rank belongs to."""
    scale: Tensor
    """(sum of ranks,): that adapter's weight times its layer's scale."""

    def repeat_gates(self, gates: Tensor) -> Tensor:
        """(n, sum of ranks) from gates (n, adapters): what each rank is multiplied by."""
        return gates[:, self.owner] * self.scale


def stack_gated_factors(module: nn.Module, path: str, blend: Blend) -> GatedFactors:
    owners = [(i, entry) for i, entry in enumerate(blend.entries) if path in entry.adapter.layers]
    weight = module.weight
    assert isinstance(weight, Tensor)
    stack = stack_factors([entry.adapter.layers[path] for _, entry in owners], weight.device)
    shape = weight_shape(module)
    scales = [get_weight_value(entry) * scale for (_, entry), scale in zip(owners, stack.scales, strict=True)]
    ranks = torch.tensor(stack.ranks, device=weight.device)
    return GatedFactors(
        down=stack.down.reshape(-1, *shape[1:]).to(weight.dtype),
        up=stack.up.reshape(*stack.up.shape, *[1] * len(shape[2:])).to(weight.dtype),
        owner=torch.tensor([i for i, _ in owners], device=weight.device).repeat_interleave(ranks),
        scale=torch.tensor(scales, device=weight.device).repeat_interleave(ranks),
    )


def wrap_with_gates(module: nn.Module, factors: GatedFactors, gates: Gates, block: str) -> Forward:
    """The module's forward with the gated adapters added; nothing is written in place, as gradients pass through."""
    own = module.forward

    def linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        columns = factors.repeat_gates(gates.get_block_gates(block)).to(x.dtype)
        hidden = functional.linear(x, factors.down) * columns.view(-1, *[1] * (x.ndim - 2), columns.shape[1])
        return own(x, *args, **kwargs) + functional.linear(hidden, factors.up)

    def convolution(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        columns = factors.repeat_gates(gates.get_block_gates(block)).to(x.dtype)
        hidden = convolve_per_sample(module, x, factors.down[None]) * columns[:, :, None, None]
        return own(x, *args, **kwargs) + functional.conv2d(hidden, factors.up)

    return linear if isinstance(module, nn.Linear) else convolution


@contextmanager
def gated_base(gates: Gates) -> Iterator[None]:
    """The gates' base with the gated adapters in its forward pass; as it was afterwards, whatever happens inside.

    The UNet takes each sample's gates by its timestep. What has no gate is in the weights, in place, so that prompts
    are to be read inside: anew for each batch, as that is a few hundredths of a training step's work at most, and
    frozen text encoders leave no graph behind. Raises ConfigError if the base holds a blend already.
    """
    base, unet = gates.base, gates.base.pipe.unet
    whole = unet.forward

    def forward(sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        gates.set_timesteps(torch.as_tensor(timestep).reshape(-1))
        return whole(sample, timestep, *args, **kwargs)

    forwards = ForwardOverrides()
    with weight_patch(base) as patch, ExitStack() as stack:
        patch.apply(gates.ungated_sum())
        stack.callback(forwards.restore)
        for path in gates.paths:
            module = module_at(base, path)
            factors = stack_gated_factors(module, path, gates.blend)
            forwards.replace(module, wrap_with_gates(module, factors, gates, gates.block_of(path)))
        forwards.replace(unet, forward)
        yield
