"""Trainable gates over frozen adapters, one for each adapter, UNet block and time bin of the denoising process.

For every module of block b, with W its weight:

    y = W x + sum_i weight_i * gate_i[b, bin(t)] * scale_i * up_i (down_i x)

MoLE [arXiv:2404.13628] weights adapters per layer in a similar way, and LoRA Soups [arXiv:2410.13025] trains scalar
weights on concatenated factors. Gates here depend on the timestep as well, because early steps determine composition
and late steps texture. There is no softmax: a gate multiplies the weight that the user gave, and 1 leaves it unchanged.
Trained gates are saved as `BlendWeight`, which all commands can read.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.factor_stack import is_joinable, stack_factors
from lora_diffusion.architectures.blocks import block_name, vector_block_names
from lora_diffusion.config.preset import BlendWeight, Schedule
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.in_place import validate_blend, weight_patch, weight_shape
from lora_diffusion.inference.low_rank_forward import low_rank_forward
from lora_diffusion.models.forward_overrides import ForwardOverrides
from lora_diffusion.models.load import Base, module_at

_GATE_DECIMALS = 4
"""Decimals of a saved gate; smaller differences are not visible in images."""


class Gates(nn.Module):
    """Trainable gates of a blend.

    There are gates for the UNet blocks in which at least one adapter has a layer. Text encoders (block BASE) and
    modules outside all blocks (time embedding, output convolution) have the constant gate `start`: text encoders encode
    the prompt once, before the first denoising step, so time bins do not apply to them.

    Args:
        base: The base that the adapters are applied to.
        blend: The adapters; their weights must be plain numbers other than 0.
        num_time_bins: Number of time bins of equal length.
        init_value: Initial value of all gates.

    Attributes:
        values: The gates, (adapters, blocks, time bins), float32.
        blocks: Names of the blocks that have gates.

    Raises:
        FamilyMismatchError: If an adapter was made for another model family.
        AdapterFormatError: If an adapter does not fit the base.
        ConfigError: If a weight is not a plain number, or a layer is of a kind that gates do not support.
    """

    def __init__(self, base: Base, blend: Blend, *, num_time_bins: int, init_value: float) -> None:
        super().__init__()
        validate_blend(base, blend)
        _check_weights(blend)
        self.base, self.blend, self.init_value = base, blend, init_value
        used = {self.block_of(path) for entry in blend.entries for path in entry.adapter.paths}
        self.blocks = tuple(block for block in vector_block_names(base.layout)[0] if block in used - {"BASE"})
        _check_layers(blend, self.paths)
        shape = (len(blend.entries), len(self.blocks), num_time_bins)
        device = base.device
        self.values = nn.Parameter(torch.full(shape, init_value, dtype=torch.float32, device=device))
        self.num_timesteps = int(base.pipe.scheduler.config.num_train_timesteps)
        self.time_bins = torch.zeros(1, dtype=torch.int64, device=device)
        """Time bin of each sample of the current batch, (n,), or one for all samples, (1,)."""

    def block_of(self, path: str) -> str:
        """Return the name of the block that contains a module; "" if it is outside all blocks."""
        return block_name(path, self.base.layout)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the UNet's modules that have gates, sorted."""
        found = {path for entry in self.blend.entries for path in entry.adapter.paths}
        return tuple(sorted(path for path in found if self.block_of(path) in self.blocks))

    def set_timesteps(self, timestep: Tensor) -> None:
        """Set the training timesteps of the current batch, (n,) or one for all, which select the time bins."""
        self.time_bins = time_bin_at(timestep, self.values.shape[2], self.num_timesteps).to(self.values.device)

    def get_block_gates(self, block: str) -> Tensor:
        """Return the gates of a block for each sample of the current batch, (n, adapters), differentiable."""
        return self.values[:, self.blocks.index(block), self.time_bins].T

    def compute_drift(self) -> Tensor:
        """Return the mean squared difference between the gates and their initial value."""
        return (self.values - self.init_value).square().mean()

    def to_weights(self) -> tuple[BlendWeight, ...]:
        """Return the adapters' weights with the gates as per-block schedules, constant within each time bin."""
        return tuple(
            BlendWeight(
                value=_get_weight_value(entry),
                blocks=self._block_factors(i, entry),
                modules=self._outside_factors(entry),
            )
            for i, entry in enumerate(self.blend.entries)
        )

    def to_blend(self) -> Blend:
        """Return the blend with `to_weights()` as its weights."""
        pairs = zip(self.blend.entries, self.to_weights(), strict=True)
        return Blend(entries=tuple(replace(entry, weight=weight) for entry, weight in pairs))

    def _block_factors(self, i: int, entry: WeightedAdapter) -> dict[str, float | Schedule]:
        """Return the gates of an adapter by block, for the blocks in which it has layers."""
        used = {self.block_of(path) for path in entry.adapter.paths}
        values: Any = cast(Any, self.values.detach().cpu().double())  # Tensor.tolist has no element type
        text: dict[str, float | Schedule] = {"BASE": self.init_value} if "BASE" in used else {}
        return text | {b: _make_schedule(values[i, j].tolist()) for j, b in enumerate(self.blocks) if b in used}

    def _outside_factors(self, entry: WeightedAdapter) -> tuple[tuple[str, float], ...]:
        """Return the constant gate for each of the adapter's modules outside all blocks."""
        return tuple((path, self.init_value) for path in entry.adapter.paths if not self.block_of(path))

    def ungated_sum(self) -> Blend:
        """Return the part of the blend without trainable gates: text encoders and modules outside all blocks."""
        factors = dict.fromkeys(self.blocks, 0.0) | {"BASE": self.init_value}
        return Blend(
            entries=tuple(
                replace(
                    entry,
                    weight=BlendWeight(
                        value=_get_weight_value(entry), blocks=factors, modules=self._outside_factors(entry)
                    ),
                )
                for entry in self.blend.entries
            )
        )


def _get_weight_value(entry: WeightedAdapter) -> float:
    assert not isinstance(entry.weight, BlendWeight)
    return float(entry.weight)


def _check_weights(blend: Blend) -> None:
    """Raise ConfigError unless every weight is a plain number other than 0, and no adapter is limited to a region."""
    for entry in blend.entries:
        if isinstance(entry.weight, BlendWeight) or entry.weight == 0:
            raise ConfigError(
                f"{entry.name}: routing needs a plain weight other than 0, which its gates multiply; give a number"
            )
        if entry.region:
            raise ConfigError(f"{entry.name}: gates cannot be limited to a region of the image; leave the region out")


def _check_layers(blend: Blend, paths: tuple[str, ...]) -> None:
    """Raise ConfigError unless there are layers in UNet blocks, and all of them are plain LoRA layers."""
    if not paths:
        raise ConfigError(
            "none of the adapters has a layer in a block of the UNet, so there are no gates to train; add an adapter "
            "that does"
        )
    for entry in blend.entries:
        layers = [(path, entry.adapter.layers[path]) for path in paths if path in entry.adapter.layers]
        unsupported = [(path, layer.kind) for path, layer in layers if not is_joinable(layer)]
        unsupported += [(path, "bias") for path in paths if path in entry.adapter.biases]
        if unsupported:
            kinds = sorted({"LoRA with a Tucker core" if kind == "LoRA" else kind for _, kind in unsupported})
            raise ConfigError(
                f"{entry.name}: gates support plain LoRA layers only, but this adapter has {len(unsupported)} of other "
                f"kinds ({', '.join(kinds)}; first: {unsupported[0][0]}); use an adapter with plain LoRA layers"
            )


def _make_schedule(gates: list[float]) -> Schedule:
    """Return a schedule with one rounded gate per time bin, from the first denoising step to the last."""
    return Schedule(points=tuple((i / len(gates), round(gate, _GATE_DECIMALS)) for i, gate in enumerate(gates)))


def time_bin_at(timestep: Tensor, num_time_bins: int, num_timesteps: int) -> Tensor:
    """Return the time bins of training timesteps.

    Denoising goes from timestep T - 1 to 0, so the middle of timestep t is at the fraction 1 - (t + 0.5) / T of the
    process; samplers differ from that by up to half a step. The computation uses integers, so that rounding cannot
    change the bin of a timestep at a boundary.

    Args:
        timestep: Timesteps, of any shape.
        num_time_bins: Number of time bins of equal length.
        num_timesteps: T, the number of timesteps of the noise schedule.

    Returns:
        Time bins from 0, which is the start of the denoising process; int64, same shape as `timestep`.
    """
    doubled = 2 * (num_timesteps - timestep.long()) - 1
    return (doubled * num_time_bins).div(2 * num_timesteps, rounding_mode="floor").clamp(0, num_time_bins - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _GatedFactors:
    """Concatenated factors of all adapters at one module, in the data type of its weight."""

    down: Tensor = field(repr=False)
    """Down factors, (sum of ranks, in, ...kernel)."""
    up: Tensor = field(repr=False)
    """Up factors, (out, sum of ranks), or (out, sum of ranks, 1, 1) for a convolution."""
    adapter_index: Tensor = field(repr=False)
    """Index of the adapter that each rank belongs to, (sum of ranks,)."""
    scale: Tensor = field(repr=False)
    """The adapter's weight times its layer's scale, for each rank, (sum of ranks,)."""

    def repeat_gates(self, gates: Tensor) -> Tensor:
        """Return the factor for each sample and rank, (n, sum of ranks), from gates (n, adapters)."""
        return gates[:, self.adapter_index] * self.scale


def _stack_gated_factors(module: nn.Module, path: str, blend: Blend) -> _GatedFactors:
    """Concatenate the factors of all adapters that have a layer at a module."""
    entries = [(i, entry) for i, entry in enumerate(blend.entries) if path in entry.adapter.layers]
    weight = module.weight
    assert isinstance(weight, Tensor)
    stack = stack_factors([entry.adapter.layers[path] for _, entry in entries], weight.device)
    shape = weight_shape(module)
    scales = [_get_weight_value(entry) * scale for (_, entry), scale in zip(entries, stack.scales, strict=True)]
    ranks = torch.tensor(stack.ranks, device=weight.device)
    return _GatedFactors(
        down=stack.down.reshape(-1, *shape[1:]).to(weight.dtype),
        up=stack.up.reshape(*stack.up.shape, *[1] * len(shape[2:])).to(weight.dtype),
        adapter_index=torch.tensor([i for i, _ in entries], device=weight.device).repeat_interleave(ranks),
        scale=torch.tensor(scales, device=weight.device).repeat_interleave(ranks),
    )


def _forward_delta(module: nn.Module, factors: _GatedFactors, gates: Gates, block: str, x: Tensor) -> Tensor:
    """Compute what the gated adapters add to the output of a module."""
    rank_gates = factors.repeat_gates(gates.get_block_gates(block))
    return low_rank_forward(module, x, factors.down, factors.up, rank_gates=rank_gates)


@contextmanager
def gated_base(gates: Gates) -> Generator[None]:
    """Apply gated adapters to the base while the context is active; restore the base afterwards.

    The UNet selects the gates of each sample by its timestep. Layers without gates are merged into the weights, those
    of the text encoders included, so prompts have to be encoded inside the context.

    Raises:
        ConfigError: If a blend is already applied to the base.
    """
    base, unet = gates.base, gates.base.pipe.unet
    unet_forward = unet.forward

    def forward(sample: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        gates.set_timesteps(torch.as_tensor(timestep).reshape(-1))
        return unet_forward(sample, timestep, *args, **kwargs)

    forwards = ForwardOverrides()
    with weight_patch(base) as patch, ExitStack() as stack:
        patch.apply(gates.ungated_sum())
        stack.callback(forwards.restore)
        for path in gates.paths:
            module = module_at(base, path)
            factors = _stack_gated_factors(module, path, gates.blend)
            forwards.add(module, partial(_forward_delta, module, factors, gates, gates.block_of(path)))
        forwards.replace(unet, forward)
        yield
