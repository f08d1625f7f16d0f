"""Adapters and their weights as people write them: `<lora:name:0.8:lbw=MIDD:start=0.2:stop=0.8>` in a prompt.

After the name come up to three numbers, the weight, or the UNet's, the text encoder's and the second text encoder's;
then options:

    te=0.5  te2=0.5  unet=0.8        the weight of one component
    lbw=MIDD  lbw=1,0,0,...          factors by block, a preset's name or a vector
    IN04=0.5  *.attn2.*=0            a factor for one block, or for a pattern of module paths
    box=0,0,0.5,1  mask=FILE         where in the picture it acts: left, top, right, bottom, or a white mask
    feather=0.1                      how soft the region's edge is
    start=0.2  stop=0.8  step=5-10   when it acts: with a point as fractions of the run, whole numbers as steps
    linear=0@0.2,1@0.8  cosine=...   factors at positions, and how to go from one to the next

The same text follows a file on the command line. Papers and programs differ in the order of two numbers: A1111 has the
text encoder first, which is how its pictures are read; here, as in this toolkit's own pictures, the UNet comes first.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lora_diffusion.adapters.coefficients import parse_vector
from lora_diffusion.config.preset import BlendWeight, Curve, Region, Schedule, Weight
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError

TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
UNKNOWN = re.compile(r"<(hypernet|lora|lyco)\b[^<>]*>?")
BLOCK = re.compile(r"BASE|M00|(?:IN|OUT)\d\d")
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet",),
    "te": ("text_encoder", "text_encoder_2"),
    "te2": ("text_encoder_2",),
}
REGION_OPTIONS = ("box", "mask", "feather")
OPTIONS = (*COMPONENTS, *REGION_OPTIONS, "lbw", "start", "stop", "step", *get_args(Curve))


@dataclass(frozen=True, kw_only=True)
class Tag:
    """An adapter that a prompt asks for."""

    name: str
    weight: Weight
    region: Region | None = None


def extract_tags(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """The prompt without its tags, and the adapters that they ask for.

    Raises ConfigError for a tag that cannot be read.
    """
    tags = tuple(parse_tag(match[1]) for match in TAG.finditer(prompt))
    bare = TAG.sub("", prompt)
    foreign = UNKNOWN.search(bare)
    if foreign and (foreign[1] == "hypernet" or foreign[0].endswith(">")):
        raise ConfigError(f"the prompt has the tag {foreign[0]!r}, which is no adapter; <lora:name:0.8> calls one")
    if not tags and not foreign:
        return prompt, ()
    if "<lora" in bare:
        raise ConfigError(
            f"the prompt has a tag without its end: {bare[bare.index('<lora') :][:40]!r}; close it with >"
        )
    return re.sub(r"[ \t]+", " ", bare).replace(" ,", ",").strip(), tags


def parse_tag(text: str) -> Tag:
    """What stands between `<lora:` and `>`. Raises ConfigError."""
    name, *parts = text.split(":")
    if not name.strip():
        raise ConfigError(f"<lora:{text}>: has no name; write <lora:name:0.8>")
    source = f"<lora:{text}>"
    rest, region = extract_region(parts, source=source)
    return Tag(name=name.strip(), weight=parse_weight(rest, source=source), region=region)


def convert_a1111_tags(prompt: str) -> str:
    """A prompt of A1111 or Forge with its tags as this toolkit writes them.

    There two numbers are the text encoder's weight and then the UNet's, and a third, the dynamic rank, has no meaning
    here.
    """

    def convert(match: re.Match[str]) -> str:
        name, *parts = match[1].split(":")
        numbers = [part for part in parts if "=" not in part]
        first = [numbers[1], numbers[0]] if len(numbers) > 1 else numbers
        options = [part for part in parts if "=" in part and not part.startswith("dyn=")]
        return f"<lora:{':'.join([name, *first, *options])}>"

    return TAG.sub(convert, prompt)


def extract_region(parts: Sequence[str], *, source: str) -> tuple[list[str], Region | None]:
    """The parts that are not about a region, and the region that the others describe. Raises ConfigError."""
    rest = [part for part in parts if part.partition("=")[0] not in REGION_OPTIONS]
    about = [part for part in parts if part not in rest]
    table: dict[str, Any] = {part.partition("=")[0]: part.partition("=")[2] for part in about}
    if not table:
        return rest, None
    if len(table) < len(about) or "" in table.values():
        raise ConfigError(f"{source}: {':'.join(about)} is no region; write box=0,0,0.5,1 or mask=FILE, each once")
    if "box" in table:
        table["box"] = parse_vector(table["box"], source=f"{source}: box")
    return rest, validate(Region, table, source=source)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_weight(parts: Sequence[str], *, source: str) -> Weight:
    """Numbers and options in that order; a lone number, or nothing, which is 1, stays a number. Raises ConfigError."""
    numbers = [part for part in parts if "=" not in part]
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    if list(parts[: len(numbers)]) != numbers or len(numbers) > 3:
        raise ConfigError(f"{source}: write up to three numbers first, then options such as lbw=MIDD")
    if len(options) < len(parts) - len(numbers):
        raise ConfigError(f"{source}: has the same option twice")
    values = [parse_number(part, source) for part in numbers]
    if not options and len(values) < 2:
        return values[0] if values else 1.0
    fields: dict[str, Any] = {"value": values[0] if values else 1.0, **parse_options(options, source)}
    if len(values) > 1:
        encoders = {"text_encoder": values[1], "text_encoder_2": values[-1]}
        fields["components"] = {**encoders, **fields.get("components", {})}
    return validate(BlendWeight, fields, source=source)


def parse_number(text: str, source: str) -> float:
    if not is_number(text) or not abs(float(text)) < float("inf"):
        raise ConfigError(f"{source}: {text!r} is no finite number; write name:0.8, or the name alone for weight 1")
    return float(text)


def parse_options(options: Mapping[str, str], source: str) -> dict[str, Any]:
    """The options as fields of `BlendWeight`."""
    fields: dict[str, Any] = {}
    components: dict[str, float] = {}
    blocks: dict[str, float] = {}
    modules: list[tuple[str, float]] = []
    for key, text in options.items():
        if key in COMPONENTS:
            components |= dict.fromkeys(COMPONENTS[key], parse_number(text, source))
        elif key == "lbw" and not text:
            raise ConfigError(f"{source}: lbw= names no preset and no vector; write lbw=MIDD")
        elif key == "lbw":
            fields["blocks"] = parse_vector(text, source=source) if "," in text else text
        elif BLOCK.fullmatch(key):
            blocks[key] = parse_number(text, source)
        elif any(sign in key for sign in "*?["):
            modules.append((key, parse_number(text, source)))
        elif key not in OPTIONS:
            raise ConfigError(
                f"{source}: unknown option {key!r}; known: {', '.join(OPTIONS)}, a block such as IN04=, "
                "or a pattern with * in it"
            )
    if blocks and "blocks" in fields:
        raise ConfigError(f"{source}: gives both lbw= and single blocks; write all of them one way")
    if blocks:
        fields["blocks"] = blocks
    found = {"components": components, "modules": tuple(modules), "schedule": parse_schedule(options, source)}
    return fields | {key: value for key, value in found.items() if value}


def parse_schedule(options: Mapping[str, str], source: str) -> Schedule | None:
    """The schedule that the options ask for, one way only. Raises ConfigError."""
    curves = [curve for curve in get_args(Curve) if curve in options]
    window = [key for key in ("start", "stop", "step") if key in options]
    if len(curves) + bool(window) > 1 or ("step" in window and len(window) > 1):
        raise ConfigError(f"{source}: says twice when it acts ({', '.join([*window, *curves])}); write one of them")
    if curves:
        return parse_curve(curves[0], options[curves[0]], source)
    if not window:
        return None
    if "step" in options:
        start, _, stop = options["step"].partition("-")
    else:
        start, stop = options.get("start", ""), options.get("stop", "")
    return step_window(start, stop, source)


def step_window(start: str, stop: str, source: str) -> Schedule:
    """On from `start` until before `stop`; either may be left out."""
    ends = [text for text in (start, stop) if text]
    unit = infer_unit(ends, source)
    points = [(0.0, 0.0 if start and parse_number(start, source) > 0 else 1.0)]
    if start and parse_number(start, source) > 0:
        points.append((parse_number(start, source), 1.0))
    if stop:
        points.append((parse_number(stop, source), 0.0))
    return validate(Schedule, {"points": points, "unit": unit, "curve": "hold"}, source=source)


def parse_curve(curve: str, text: str, source: str) -> Schedule:
    """`0@0.2,1@0.8`: factors at positions."""
    pairs = [part.partition("@") for part in text.split(",")]
    if not all(at for _, at, _ in pairs):
        raise ConfigError(f"{source}: {curve}={text} is no list of factor@position; write {curve}=0@0.2,1@0.8")
    unit = infer_unit([position for _, _, position in pairs], source)
    points = [(parse_number(position, source), parse_number(factor, source)) for factor, _, position in pairs]
    return validate(Schedule, {"points": points, "unit": unit, "curve": curve}, source=source)


def infer_unit(positions: Sequence[str], source: str) -> str:
    """Fractions have a point, steps have none; 0 is both."""
    told = [position for position in positions if position.strip() != "0"]
    fractions = ["." in position for position in told]
    if len(set(fractions)) > 1:
        raise ConfigError(f"{source}: mixes fractions and steps; write 0.2 and 1.0, or 4 and 20")
    if any(fractions) and any(parse_number(position, source) > 1 for position in told):
        raise ConfigError(f"{source}: a fraction of the run is at most 1.0; write whole numbers for steps")
    return "fraction" if any(fractions) else "step"


def format_weight(weight: Weight) -> str:
    """The weight as `parse_weight` reads it, without the name; what has no short form is in the recipe alone."""
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
        parts.append(format_schedule(weight.schedule))
    return ":".join(parts)


def format_schedule(schedule: Schedule) -> str:
    fraction = schedule.unit == "fraction"
    points = ",".join(f"{factor:g}@{position if fraction else int(position)}" for position, factor in schedule.points)
    return f"{schedule.curve}={points}"
