"""Parse and format adapter tags such as `<lora:name:0.8:lbw=MIDD:start=0.2:stop=0.8>`.

Up to three numbers follow the name: the weight, or the weights of the UNet, the text encoder and the second text
encoder. Options follow the numbers:

    te=0.5  te2=0.5  unet=0.8        weight of one component
    lbw=MIDD  lbw=1,0,0,...          factors by block: a preset or a vector
    IN04=0.5  *.attn2.*=0            factor of one block, or of a pattern of module paths
    box=0,0,0.5,1  mask=FILE         region of the image: left, top, right, bottom, or a mask that is white inside
    feather=0.1                      softness of the region's edge
    start=0.2  stop=0.8  step=5-10   window of steps: numbers with a point are fractions of the run, integers are steps
    linear=0@0.2,1@0.8  cosine=...   factors at positions, and the interpolation between them

The same text follows a file name on the command line. A1111 puts the text encoder's weight before the UNet's, so its
prompts are converted by `convert_a1111_tags`; everywhere else in this project the UNet comes first.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lora_diffusion.adapters.coefficients import parse_vector
from lora_diffusion.config.preset import BlendWeight, Curve, Region, Schedule, Weight
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
_ANY_TAG = re.compile(r"<(hypernet|lora|lyco)\b[^<>]*>?")
_BLOCK = re.compile(r"BASE|M00|(?:IN|OUT)\d\d")
_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet",),
    "te": ("text_encoder", "text_encoder_2"),
    "te2": ("text_encoder_2",),
}
_REGION_OPTIONS = ("box", "mask", "feather")
_OPTIONS = (*_COMPONENTS, *_REGION_OPTIONS, "lbw", "start", "stop", "step", *get_args(Curve))


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A parsed `<lora:...>` tag."""

    name: str
    """Name of the adapter in the library."""
    weight: Weight
    region: Region | None = None
    """Region of the image that the adapter acts in; None for the whole image."""


def extract_tags(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """Split a prompt into its text and its adapter tags.

    Returns:
        The prompt without tags, and the tags in order.

    Raises:
        ConfigError: If a tag is malformed or not a `lora` or `lyco` tag.
    """
    tags = tuple(_parse_tag(match[1]) for match in _TAG.finditer(prompt))
    text = _TAG.sub("", prompt)
    other = _ANY_TAG.search(text)
    if other and (other[1] == "hypernet" or other[0].endswith(">")):
        raise ConfigError(
            f"the prompt has the tag {other[0]!r}, which is not supported; load an adapter with <lora:name:0.8>"
        )
    if not tags and not other:
        return prompt, ()
    if "<lora" in text:
        raise ConfigError(
            f"the prompt has a tag that is not closed: {text[text.index('<lora') :][:40]!r}; close it with >"
        )
    return re.sub(r"[ \t]+", " ", text).replace(" ,", ",").strip(), tags


def _parse_tag(text: str) -> Tag:
    """Parse the text between `<lora:` and `>`."""
    name, *parts = text.split(":")
    if not name.strip():
        raise ConfigError(f"<lora:{text}>: has no name; write <lora:name:0.8>")
    source = f"<lora:{text}>"
    rest, region = extract_region(parts, source=source)
    return Tag(name=name.strip(), weight=parse_weight(rest, source=source), region=region)


def convert_a1111_tags(prompt: str) -> str:
    """Convert the tags of an A1111 or Forge prompt to this project's order of numbers.

    In A1111 the first of two numbers is the weight of the text encoder and the second that of the UNet. A third number,
    the dynamic rank, has no equivalent here and is dropped.
    """

    def convert(match: re.Match[str]) -> str:
        name, *parts = match[1].split(":")
        numbers = [part for part in parts if "=" not in part]
        first = [numbers[1], numbers[0]] if len(numbers) > 1 else numbers
        options = [part for part in parts if "=" in part and not part.startswith("dyn=")]
        return f"<lora:{':'.join([name, *first, *options])}>"

    return _TAG.sub(convert, prompt)


def extract_region(parts: Sequence[str], *, source: str) -> tuple[list[str], Region | None]:
    """Separate the region options of a tag from the others.

    Args:
        parts: Parts of the tag after the name.
        source: The tag, for error messages.

    Returns:
        The other parts, and the region, or None if there are no region options.

    Raises:
        ConfigError: If the region is invalid.
    """
    rest = [part for part in parts if part.partition("=")[0] not in _REGION_OPTIONS]
    options = [part for part in parts if part not in rest]
    table: dict[str, Any] = {part.partition("=")[0]: part.partition("=")[2] for part in options}
    if not table:
        return rest, None
    if len(table) < len(options) or "" in table.values():
        raise ConfigError(
            f"{source}: {':'.join(options)} is not a region; write box=0,0,0.5,1 or mask=FILE, with each option once"
        )
    if "box" in table:
        table["box"] = parse_vector(table["box"], source=f"{source}: box")
    return rest, validate(Region, table, source=source)


def is_number(text: str) -> bool:
    """Return whether `float` accepts the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_weight(parts: Sequence[str], *, source: str) -> Weight:
    """Parse the numbers and options of a tag.

    Args:
        parts: Up to three numbers followed by `key=value` options, without region options.
        source: The tag, for error messages.

    Returns:
        A float if there is one number and no options (1.0 if there is nothing), otherwise a `BlendWeight`.

    Raises:
        ConfigError: If a number or option is invalid.
    """
    numbers = [part for part in parts if "=" not in part]
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    if list(parts[: len(numbers)]) != numbers or len(numbers) > 3:
        raise ConfigError(f"{source}: expected up to three numbers, followed by options such as lbw=MIDD")
    if len(options) < len(parts) - len(numbers):
        raise ConfigError(f"{source}: has the same option twice")
    values = [_parse_number(part, source) for part in numbers]
    if not options and len(values) < 2:
        return values[0] if values else 1.0
    fields: dict[str, Any] = {"value": values[0] if values else 1.0, **_parse_options(options, source)}
    if len(values) > 1:
        encoders = {"text_encoder": values[1], "text_encoder_2": values[-1]}
        fields["components"] = {**encoders, **fields.get("components", {})}
    return validate(BlendWeight, fields, source=source)


def _parse_number(text: str, source: str) -> float:
    if not is_number(text) or not abs(float(text)) < float("inf"):
        raise ConfigError(f"{source}: {text!r} is not a finite number; write name:0.8, or the name alone for weight 1")
    return float(text)


def _parse_options(options: Mapping[str, str], source: str) -> dict[str, Any]:
    """Parse options to the fields of a `BlendWeight`."""
    fields: dict[str, Any] = {}
    components: dict[str, float] = {}
    blocks: dict[str, float] = {}
    modules: list[tuple[str, float]] = []
    for key, text in options.items():
        if key in _COMPONENTS:
            components |= dict.fromkeys(_COMPONENTS[key], _parse_number(text, source))
        elif key == "lbw" and not text:
            raise ConfigError(f"{source}: lbw= is empty; write a preset such as lbw=MIDD, or a vector")
        elif key == "lbw":
            fields["blocks"] = parse_vector(text, source=source) if "," in text else text
        elif _BLOCK.fullmatch(key):
            blocks[key] = _parse_number(text, source)
        elif any(wildcard in key for wildcard in "*?["):
            modules.append((key, _parse_number(text, source)))
        elif key not in _OPTIONS:
            raise ConfigError(
                f"{source}: unknown option {key!r}; expected one of {', '.join(_OPTIONS)}, a block such as IN04=, "
                "or a pattern of module paths with *"
            )
    if blocks and "blocks" in fields:
        raise ConfigError(f"{source}: has both lbw= and factors for single blocks; use one of them")
    if blocks:
        fields["blocks"] = blocks
    nested = {"components": components, "modules": tuple(modules), "schedule": _parse_schedule(options, source)}
    return fields | {key: value for key, value in nested.items() if value}


def _parse_schedule(options: Mapping[str, str], source: str) -> Schedule | None:
    """Parse the schedule options, of which only one form may be used."""
    curves = [curve for curve in get_args(Curve) if curve in options]
    window = [key for key in ("start", "stop", "step") if key in options]
    if len(curves) + bool(window) > 1 or ("step" in window and len(window) > 1):
        raise ConfigError(f"{source}: has more than one schedule ({', '.join([*window, *curves])}); use one of them")
    if curves:
        return _parse_curve(curves[0], options[curves[0]], source)
    if not window:
        return None
    if "step" in options:
        start, _, stop = options["step"].partition("-")
    else:
        start, stop = options.get("start", ""), options.get("stop", "")
    return _parse_window(start, stop, source)


def _parse_window(start: str, stop: str, source: str) -> Schedule:
    """Create a schedule that is 1 from `start` (inclusive) to `stop` (exclusive) and 0 elsewhere; each may be empty."""
    ends = [text for text in (start, stop) if text]
    unit = _infer_unit(ends, source)
    points = [(0.0, 0.0 if start and _parse_number(start, source) > 0 else 1.0)]
    if start and _parse_number(start, source) > 0:
        points.append((_parse_number(start, source), 1.0))
    if stop:
        points.append((_parse_number(stop, source), 0.0))
    return validate(Schedule, {"points": points, "unit": unit, "curve": "hold"}, source=source)


def _parse_curve(curve: str, text: str, source: str) -> Schedule:
    """Parse factors at positions, such as `0@0.2,1@0.8`."""
    pairs = [part.partition("@") for part in text.split(",")]
    if not all(separator for _, separator, _ in pairs):
        raise ConfigError(f"{source}: {curve}={text} is not a list of factor@position; write {curve}=0@0.2,1@0.8")
    unit = _infer_unit([position for _, _, position in pairs], source)
    points = [(_parse_number(position, source), _parse_number(factor, source)) for factor, _, position in pairs]
    return validate(Schedule, {"points": points, "unit": unit, "curve": curve}, source=source)


def _infer_unit(positions: Sequence[str], source: str) -> str:
    """Return `fraction` if the positions have a decimal point and `step` if they do not; 0 may be either."""
    nonzero = [position for position in positions if position.strip() != "0"]
    fractions = ["." in position for position in nonzero]
    if len(set(fractions)) > 1:
        raise ConfigError(
            f"{source}: mixes fractions and steps; write all positions as fractions (0.2, 1.0) or as steps (4, 20)"
        )
    if any(fractions) and any(_parse_number(position, source) > 1 for position in nonzero):
        raise ConfigError(f"{source}: a fraction of the run is at most 1.0; write integers for steps")
    return "fraction" if any(fractions) else "step"


def format_weight(weight: Weight) -> str:
    """Format a weight as `parse_weight` reads it.

    Schedules of single blocks have no text form and are left out; recipes record them.
    """
    if not isinstance(weight, BlendWeight):
        return f"{weight:g}"
    parts = [f"{weight.value:g}"]
    names = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}
    parts += [f"{names[component]}={value:g}" for component, value in weight.components.items()]
    if isinstance(weight.blocks, str):
        parts.append(f"lbw={weight.blocks}")
    elif isinstance(weight.blocks, tuple):
        parts.append(f"lbw={','.join(f'{value:g}' for value in weight.blocks)}")
    else:
        parts += [f"{block}={f:g}" for block, f in weight.blocks.items() if not isinstance(f, Schedule)]
    parts += [f"{pattern}={factor:g}" for pattern, factor in weight.modules]
    if weight.schedule:
        parts.append(_format_schedule(weight.schedule))
    return ":".join(parts)


def _format_schedule(schedule: Schedule) -> str:
    fraction = schedule.unit == "fraction"
    points = ",".join(f"{factor:g}@{position if fraction else int(position)}" for position, factor in schedule.points)
    return f"{schedule.curve}={points}"
