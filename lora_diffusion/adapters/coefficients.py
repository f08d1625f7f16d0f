"""Evaluate the weight of an adapter at each module and denoising step: components, blocks, patterns and schedules.

Blocks have the names of sd-webui-lora-block-weight: BASE is the text encoders; IN00 to IN11, M00 and OUT00 to OUT11 are
the blocks of the UNet in the order of the original checkpoints. A block vector lists either all blocks (26 values for
SD 1.x and 2.x, 20 for SDXL) or those with attention (17 or 12). Blocks without a factor keep the adapter's weight.
"""

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lora_diffusion.architectures.blocks import block_name, vector_block_names
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.preset import BlendWeight, Schedule, Weight
from lora_diffusion.errors import ConfigError

BlockPresets = Mapping[str, tuple[tuple[float, ...], ...]]
"""Block vectors by preset name. A name may have several vectors, of the lengths of different families."""

_VECTOR_LENGTHS = (12, 17, 20, 26)
_FLUX_VECTOR_LENGTH = 61


@dataclass(frozen=True, kw_only=True)
class DenoisingStep:
    """One step of a denoising run."""

    index: int
    """Index of the step, from 0."""
    total: int
    """Number of steps in the run."""

    def position(self, unit: str) -> float:
        """Return the position in a schedule: the index for the unit `step`, (index + 0.5) / total for `fraction`."""
        return float(self.index) if unit == "step" else (self.index + 0.5) / self.total


def schedule_factor(schedule: Schedule, denoising_step: DenoisingStep) -> float:
    """Evaluate a schedule at one denoising step."""
    position = denoising_step.position(schedule.unit)
    before = [point for point in schedule.points if point[0] <= position]
    after = [point for point in schedule.points if point[0] > position]
    if not before or not after or schedule.curve == "hold":
        return (before[-1] if before else after[0])[1]
    (start, first), (end, last) = before[-1], after[0]
    fraction = (position - start) / (end - start)
    if schedule.curve == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return first + (last - first) * fraction


def stock_presets(layout: ModelLayout) -> dict[str, dict[str, float]]:
    """Return the factors by block of the stock block presets, by preset name.

    INS and IND are the shallow and the deep half of the input blocks with attention, OUTD and OUTS the deep and the
    shallow half of the output blocks; MIDD is everything deep. For SD 1.x they are the 17 values of
    [github.com/hako-mikan/sd-webui-lora-block-weight]; other families are divided into the same halves.
    """
    _, attention_blocks = vector_block_names(layout)
    ins = [block for block in attention_blocks if block.startswith("IN")]
    outs = [block for block in attention_blocks if block.startswith("OUT")]
    shallow_in, deep_in = ins[: len(ins) // 2], ins[len(ins) // 2 :]
    deep_out, shallow_out = outs[: len(outs) // 2], outs[len(outs) // 2 :]
    enabled: dict[str, list[str]] = {
        "NONE": [],
        "ALL": list(attention_blocks),
        "INS": ["BASE", *shallow_in],
        "IND": ["BASE", *deep_in],
        "INALL": ["BASE", *ins],
        "MIDD": ["BASE", *deep_in, "M00", *deep_out],
        "OUTD": ["BASE", *deep_out],
        "OUTS": ["BASE", *shallow_out],
        "OUTALL": ["BASE", *outs],
    }
    if outs[:2] == ["OUT00", "OUT01"]:  # the two blocks that B-LoRA trains [arXiv:2403.14572]
        enabled |= {"BLORA-CONTENT": ["OUT00"], "BLORA-STYLE": ["OUT01"]}
    presets = {name: {block: float(block in on) for block in attention_blocks} for name, on in enabled.items()}
    return presets | {"ALL0.5": dict.fromkeys(attention_blocks, 0.5)}


def block_factors(
    blocks: str | tuple[float, ...] | Mapping[str, float | Schedule],
    layout: ModelLayout,
    presets: BlockPresets | None = None,
) -> dict[str, float | Schedule]:
    """Resolve a block preset, block vector or mapping to factors by block name.

    Args:
        blocks: Name of a preset, vector of factors, or factors by block name.
        layout: Layout of the base model.
        presets: Presets of the user, which take precedence over the stock presets.

    Raises:
        ConfigError: If the preset or a block is unknown, or the vector has the wrong length.
    """
    all_blocks, attention_blocks = vector_block_names(layout)
    if isinstance(blocks, str):
        return _find_block_preset(blocks, layout, presets or {})
    if isinstance(blocks, tuple):
        for names in (attention_blocks, all_blocks):
            if len(names) == len(blocks):
                return dict(zip(names, blocks, strict=True))
        raise ConfigError(
            f"a block vector of {len(blocks)} values does not fit this base; expected {len(attention_blocks)} values "
            f"({', '.join(attention_blocks)}) or {len(all_blocks)} (all blocks)"
        )
    for block in blocks:
        if block not in all_blocks:
            near = difflib.get_close_matches(block, all_blocks, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown block {block!r}{hint} (blocks of this base: {', '.join(all_blocks)})")
    return dict(blocks)


def _find_block_preset(name: str, layout: ModelLayout, presets: BlockPresets) -> dict[str, float | Schedule]:
    if name in presets:
        fitting = [v for v in presets[name] if len(v) in map(len, vector_block_names(layout))]
        return block_factors((fitting or list(presets[name]))[0], layout)
    stock = stock_presets(layout)
    if name not in stock:
        known = [*stock, *presets]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known presets: {', '.join(known)}"
        raise ConfigError(f"unknown block preset {name!r}; {hint}")
    return dict(stock[name])


def expand_block_preset(weight: Weight, layout: ModelLayout, presets: BlockPresets | None = None) -> Weight:
    """Replace the block preset or vector of a weight by factors by block name.

    A recipe with the expanded weight does not depend on the user's preset file.

    Raises:
        ConfigError: As `block_factors`.
    """
    if not isinstance(weight, BlendWeight) or not weight.blocks:
        return weight
    return weight.model_copy(update={"blocks": block_factors(weight.blocks, layout, presets)})


def coefficients(
    weight: Weight, paths: Iterable[str], layout: ModelLayout | None, denoising_step: DenoisingStep | None
) -> dict[str, float]:
    """Evaluate a weight at each module path.

    The coefficient is the weight of the component (or `value`), times the factor of the block, the factor of the last
    matching module pattern and the schedule.

    Args:
        weight: Weight of an adapter in a blend.
        paths: Module paths of the adapter.
        layout: Layout of the base model, required for weights by block.
        denoising_step: Step to evaluate, required for schedules.

    Raises:
        ConfigError: If a block does not exist in the base, or `layout` or `denoising_step` is missing where required.
    """
    if not isinstance(weight, BlendWeight):
        return dict.fromkeys(paths, weight)
    if weight.blocks and layout is None:
        raise ConfigError("weights by block need a base of a known model family; use factors by module pattern instead")
    blocks = block_factors(weight.blocks, layout) if layout is not None and weight.blocks else {}
    result: dict[str, float] = {}
    component_weights = {str(component): value for component, value in weight.components.items()}
    for path in paths:
        component = path.split(".", 1)[0]
        factor = blocks.get(block_name(path, layout), 1.0) if layout is not None and blocks else 1.0
        matching = [value for pattern, value in weight.modules if fnmatchcase(path, pattern)]
        value = component_weights.get(component, weight.value)
        value *= matching[-1] if matching else 1.0
        for part in (factor, weight.schedule):
            value *= _factor_at_step(part, denoising_step, ignore_schedule=component != "unet")
        result[path] = value
    return result


def _factor_at_step(
    factor: float | Schedule | None, denoising_step: DenoisingStep | None, *, ignore_schedule: bool
) -> float:
    if not isinstance(factor, Schedule):
        return 1.0 if factor is None else factor
    if ignore_schedule:  # text encoders run once, before the first denoising step
        return 1.0
    if denoising_step is None:
        raise ConfigError(
            "a schedule over denoising steps can only be applied while sampling; use a constant weight here"
        )
    return schedule_factor(factor, denoising_step)


def has_schedule(weight: Weight) -> bool:
    """Return whether a weight changes from one denoising step to the next."""
    if not isinstance(weight, BlendWeight):
        return False
    blocks = weight.blocks.values() if isinstance(weight.blocks, Mapping) else ()
    return weight.schedule is not None or any(isinstance(factor, Schedule) for factor in blocks)


def without_schedules(weight: Weight) -> Weight:
    """Return the weight with all schedules replaced by the constant factor 1."""
    if not isinstance(weight, BlendWeight):
        return weight
    blocks = weight.blocks
    if isinstance(blocks, Mapping):
        blocks = {block: 1.0 if isinstance(factor, Schedule) else factor for block, factor in blocks.items()}
    return weight.model_copy(update={"schedule": None, "blocks": blocks})


def is_zero(weight: Weight) -> bool:
    """Return whether a weight and all its component weights are 0. Block and pattern factors are not examined."""
    if not isinstance(weight, BlendWeight):
        return weight == 0
    return weight.value == 0 and not any(weight.components.values())


def read_block_presets(path: str | os.PathLike[str]) -> BlockPresets:
    """Read an `lbwpresets.txt` of sd-webui-lora-block-weight.

    Each line is `NAME:value,value,...` with 12, 17, 20 or 26 values. Lines that contain a # are comments. Lines of 61
    values are presets for Flux and skipped.

    Raises:
        ConfigError: If the file cannot be read, or a line has another form.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected lines such as MIDD:1,0,0,...") from None
    presets: dict[str, tuple[tuple[float, ...], ...]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, colon, values = line.strip().partition(":")
        if "#" in line or not line.strip():
            continue
        vector = parse_vector(values, source=f"{path}, line {number}") if colon else ()
        if len(vector) == _FLUX_VECTOR_LENGTH:
            continue
        if len(vector) not in _VECTOR_LENGTHS:
            raise ConfigError(
                f"{path}, line {number}: has {len(vector)} values; expected NAME: and 12, 17, 20 or 26 values"
            )
        presets[name.strip()] = (*presets.get(name.strip(), ()), vector)
    return presets


def parse_vector(text: str, *, source: str) -> tuple[float, ...]:
    """Parse comma-separated numbers.

    Args:
        text: Numbers such as `1,0,0.5`.
        source: Where the text comes from, for error messages.

    Raises:
        ConfigError: If a value is not a finite number.
    """
    values: list[float] = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise ConfigError(
                f"{source}: {part.strip()!r} is not a number; the letters R and U of sd-webui-lora-block-weight stand "
                "for random values, which are not supported because a recipe could not repeat them"
            )
    return tuple(values)
