"""What an adapter's weight comes to at one module and one step: by component, block, pattern and schedule.

Blocks go by the names that users know: BASE is the text encoders, IN00 to IN11, M00 and OUT00 to OUT11 are the UNet's
blocks in the order of the original checkpoints. A vector names all of them (26 values for SD 1.x and 2.x, 20 for SDXL)
or those with attention (17, 12). One policy for whatever it does not name: it keeps the adapter's weight.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lora_diffusion.architectures.blocks import block_name, vector_block_names
from lora_diffusion.architectures.module_paths import ModelLayout
from lora_diffusion.config.preset import BlendWeight, Schedule, Weight
from lora_diffusion.errors import ConfigError

BlockPresets = Mapping[str, tuple[tuple[float, ...], ...]]
"""Vectors by name; one name may have vectors for several families."""

FLUX_VECTOR = 61


@dataclass(frozen=True, kw_only=True)
class DenoisingStep:
    """One denoising step of a run."""

    index: int
    """Its number, from 0."""
    total: int

    def position(self, unit: str) -> float:
        """Where a schedule sees it: its number in steps, or its middle as a fraction of the run."""
        return float(self.index) if unit == "step" else (self.index + 0.5) / self.total


def schedule_factor(schedule: Schedule, denoising_step: DenoisingStep) -> float:
    """The factor at one step."""
    here = denoising_step.position(schedule.unit)
    before = [point for point in schedule.points if point[0] <= here]
    after = [point for point in schedule.points if point[0] > here]
    if not before or not after or schedule.curve == "hold":
        return (before[-1] if before else after[0])[1]
    (start, first), (end, last) = before[-1], after[0]
    share = (here - start) / (end - start)
    if schedule.curve == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return first + (last - first) * share


def stock_presets(layout: ModelLayout) -> dict[str, dict[str, float]]:
    """Factors by block of the presets that everybody uses, by name.

    INS and IND are the shallow and the deep half of the blocks with attention on the way in, OUTD and OUTS on the way
    out; MIDD is all that is deep. For SD 1.x these are the 17 values of their origin
    [github.com/hako-mikan/sd-webui-lora-block-weight]; for other families the same halves.
    """
    _, attentive = vector_block_names(layout)
    ins = [block for block in attentive if block.startswith("IN")]
    outs = [block for block in attentive if block.startswith("OUT")]
    shallow_in, deep_in = ins[: len(ins) // 2], ins[len(ins) // 2 :]
    deep_out, shallow_out = outs[: len(outs) // 2], outs[len(outs) // 2 :]
    chosen: dict[str, list[str]] = {
        "NONE": [],
        "ALL": list(attentive),
        "INS": ["BASE", *shallow_in],
        "IND": ["BASE", *deep_in],
        "INALL": ["BASE", *ins],
        "MIDD": ["BASE", *deep_in, "M00", *deep_out],
        "OUTD": ["BASE", *deep_out],
        "OUTS": ["BASE", *shallow_out],
        "OUTALL": ["BASE", *outs],
    }
    if outs[:2] == ["OUT00", "OUT01"]:  # what adapters of B-LoRA [arXiv:2403.14572] are made of
        chosen |= {"BLORA-CONTENT": ["OUT00"], "BLORA-STYLE": ["OUT01"]}
    presets = {name: {block: float(block in on) for block in attentive} for name, on in chosen.items()}
    return presets | {"ALL0.5": dict.fromkeys(attentive, 0.5)}


def block_factors(
    blocks: str | tuple[float, ...] | Mapping[str, float | Schedule],
    layout: ModelLayout,
    presets: BlockPresets | None = None,
) -> dict[str, float | Schedule]:
    """Factors by block name. Raises ConfigError for an unknown preset or block, or a vector of the wrong length."""
    every, attentive = vector_block_names(layout)
    if isinstance(blocks, str):
        return find_block_preset(blocks, layout, presets or {})
    if isinstance(blocks, tuple):
        for names in (attentive, every):
            if len(names) == len(blocks):
                return dict(zip(names, blocks, strict=True))
        raise ConfigError(
            f"a block vector of {len(blocks)} values does not fit this base; expected {len(attentive)} "
            f"({', '.join(attentive)}) or {len(every)} (all blocks)"
        )
    for block in blocks:
        if block not in every:
            near = difflib.get_close_matches(block, every, n=1)
            raise ConfigError(f"unknown block {block!r}{f'; did you mean {near[0]}?' if near else ''} ({every})")
    return dict(blocks)


def find_block_preset(name: str, layout: ModelLayout, presets: BlockPresets) -> dict[str, float | Schedule]:
    if name in presets:
        fitting = [v for v in presets[name] if len(v) in map(len, vector_block_names(layout))]
        return block_factors((fitting or list(presets[name]))[0], layout)
    stock = stock_presets(layout)
    if name not in stock:
        known = [*stock, *presets]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known ones: {', '.join(known)}"
        raise ConfigError(f"unknown block preset {name!r}; {hint}")
    return dict(stock[name])


def expand_block_preset(weight: Weight, layout: ModelLayout, presets: BlockPresets | None = None) -> Weight:
    """The weight with its block preset or vector as factors by name, so that it means the same everywhere.

    Raises ConfigError as `block_factors` does.
    """
    if not isinstance(weight, BlendWeight) or not weight.blocks:
        return weight
    return weight.model_copy(update={"blocks": block_factors(weight.blocks, layout, presets)})


def coefficients(
    weight: Weight, paths: Iterable[str], layout: ModelLayout | None, denoising_step: DenoisingStep | None
) -> dict[str, float]:
    """Evaluate the weight at each module path.

    Raises ConfigError for blocks that the base does not have, or for a schedule if `denoising_step` is None.
    """
    if not isinstance(weight, BlendWeight):
        return dict.fromkeys(paths, weight)
    if weight.blocks and layout is None:
        raise ConfigError("weights by block need a base of a known family; give factors by module pattern instead")
    blocks = block_factors(weight.blocks, layout) if layout is not None and weight.blocks else {}
    found: dict[str, float] = {}
    own = {str(component): value for component, value in weight.components.items()}
    for path in paths:
        component = path.split(".", 1)[0]
        factor = blocks.get(block_name(path, layout), 1.0) if layout is not None and blocks else 1.0
        matching = [value for pattern, value in weight.modules if fnmatchcase(path, pattern)]
        value = own.get(component, weight.value)
        value *= matching[-1] if matching else 1.0
        for part in (factor, weight.schedule):
            value *= factor_at_step(part, denoising_step, timeless=component != "unet")
        found[path] = value
    return found


def factor_at_step(factor: float | Schedule | None, denoising_step: DenoisingStep | None, *, timeless: bool) -> float:
    if not isinstance(factor, Schedule):
        return 1.0 if factor is None else factor
    if timeless:
        return 1.0
    if denoising_step is None:
        raise ConfigError("a schedule over steps has no meaning here, where there are none; give plain weights")
    return schedule_factor(factor, denoising_step)


def has_schedule(weight: Weight) -> bool:
    """Whether it changes from step to step."""
    if not isinstance(weight, BlendWeight):
        return False
    blocks = weight.blocks.values() if isinstance(weight.blocks, Mapping) else ()
    return weight.schedule is not None or any(isinstance(factor, Schedule) for factor in blocks)


def without_schedules(weight: Weight) -> Weight:
    """The weight as if all its schedules were 1."""
    if not isinstance(weight, BlendWeight):
        return weight
    blocks = weight.blocks
    if isinstance(blocks, Mapping):
        blocks = {block: 1.0 if isinstance(factor, Schedule) else factor for block, factor in blocks.items()}
    return weight.model_copy(update={"schedule": None, "blocks": blocks})


def is_zero(weight: Weight) -> bool:
    """Whether it is 0 everywhere, at every step."""
    if not isinstance(weight, BlendWeight):
        return weight == 0
    return weight.value == 0 and not any(weight.components.values())


def read_block_presets(path: Path) -> BlockPresets:
    """An `lbwpresets.txt`: one `NAME:value,...` a line, of 12, 17, 20 or 26 values; a line with a # is a comment.

    Lines of 61 values are for Flux and left out. Raises ConfigError for any other line.
    """
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
        if len(vector) == FLUX_VECTOR:
            continue
        if len(vector) not in (12, 17, 20, 26):
            raise ConfigError(
                f"{path}, line {number}: {len(vector)} values; expected NAME: and 12, 17, 20 or 26 values"
            )
        presets[name.strip()] = (*presets.get(name.strip(), ()), vector)
    return presets


def parse_vector(text: str, *, source: str) -> tuple[float, ...]:
    """Comma-separated numbers. Raises ConfigError."""
    values: list[float] = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise ConfigError(
                f"{source}: {part.strip()!r} is no number; letters such as R and U stand for random values, which no "
                "recipe could repeat"
            )
    return tuple(values)
