"""Parse the infotext that A1111 and Forge write into images, and convert it to `GenerateConfig` settings.

    a lighthouse at night <lora:ink:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Lora hashes: "ink: 1585b50b9d7d"

The text is stored under the key `parameters` of a PNG, or in the EXIF UserComment of a JPEG or WebP. Programs write it
differently, so the parser is lenient. Each setting that cannot be reproduced is reported in a sentence of its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from lora_diffusion.config.generate import GenerateConfig, Scheduler
from lora_diffusion.errors import ConfigError

_KEY = re.compile(r"\s*(\w[\w \-/]+):\s*")
_STRING = re.compile(r'"(?:\\.|[^\\"])*"')
_VALUE_END = re.compile(r"\s*(?:,|\Z)")
_HASH = re.compile(r"\s*[0-9A-Fa-f]+\s*")
_SIZE = re.compile(r"(\d+) ?[xX×] ?(\d+)", re.ASCII)
_NEGATIVE = "Negative prompt:"
_TEMPLATES = ("Template", "Negative Template")
_MIN_PAIRS = 3
_MAX_QUOTE_LENGTH = 60
# Characters of a JSON table that the parser reads at most for a value that starts with a bracket, so that a line with
# many brackets does not take quadratic time.
_MAX_TABLE_LENGTH = 20_000

_FIELDS = {
    "seed": "Seed",
    "num_inference_steps": "Steps",
    "guidance_scale": "CFG scale",
    "width": "Size",
    "height": "Size",
}
"""Settings of `GenerateConfig` and the infotext keys that hold them."""
_VARIATION = {"variation_seed": "Variation seed", "variation": "Variation seed strength"}
"""The same for optional settings, whose absence is not reported."""

_SAMPLERS: Mapping[str, Scheduler] = {
    **{name: name for name in get_args(Scheduler)},
    "euler a": "euler-ancestral",
    "euler ancestral": "euler-ancestral",
    "dpm++ 2m": "dpm++",
    "dpmpp 2m": "dpm++",
}
"""Supported schedulers by the sampler names of A1111 and ComfyUI, in lower case without underscores."""

_SCHEDULES = (
    *("karras", "polyexponential", "exponential", "sgm uniform", "uniform", "simple", "normal", "beta", "turbo"),
    *("kl optimal", "align your steps", "automatic"),
)
"""Schedules that may follow a sampler's name. The first match is used, so `polyexponential` precedes `exponential`."""

_DEFAULT_SCHEDULES = ("", "automatic", "uniform")
"""Schedules that select the default steps of a sampler."""

_IGNORED_KEYS = (
    *("version", "model", "model hash", "vae hash", "lora hashes", "ti hashes", "hashes", "civitai resources"),
    *("civitai metadata", "created date", "user", "batch size", "batch pos", "template", "negative template"),
    *("sampler", "schedule type", "scheduler", "rng"),
)
"""Keys in lower case that do not change the image, or that other code reports on."""

_UNSUPPORTED = {
    "hires": "hires fix is not supported",
    "adetailer": "ADetailer is not supported",
    "clip": "CLIP skip is not supported",
    "denoising": "the image starts from pure noise",
    "refiner": "a refiner model is not supported",
    "vae": "the VAE of the base is used",
    "controlnet": "ControlNet is not supported",
}
"""What happens with unsupported settings, by the first word of their key in lower case."""


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """A parsed infotext, with values as written in the image."""

    prompt: str
    """Prompt, including its `<lora:...>` tags."""
    negative_prompt: str = ""
    """Negative prompt; empty if there is none."""
    settings: dict[str, str] = field(default_factory=dict[str, str])
    """All pairs of the settings line, in order and with unquoted values."""
    lora_hashes: dict[str, str] = field(default_factory=dict[str, str])
    """Hashes of the adapters by name: the first 12 hex digits of the SHA-256 over the tensors of the file."""
    ti_hashes: dict[str, str] = field(default_factory=dict[str, str])
    """The same for textual inversion embeddings."""
    model: str = ""
    """Name of the checkpoint."""
    model_hash: str = ""
    """First hex digits of the checkpoint's SHA-256."""


def parse_infotext(text: str, *, source: str) -> Infotext:
    """Parse an infotext. Windows line endings are converted; all other text is kept as written.

    Args:
        text: The infotext.
        source: Name of the image, for error messages.

    Raises:
        ConfigError: If the text does not end in a line of settings.
    """
    lines = split_lines(text)
    at = find_settings_line(lines)
    if at is None:
        raise ConfigError(
            f"{source}: its infotext has no line of settings; expected a last line such as 'Steps: 20, Sampler: "
            "Euler a, CFG scale: 7, Seed: 1, Size: 512x512', as A1111 and Forge write it (ComfyUI workflows are not "
            "supported)"
        )
    prompt, negative = _parse_prompts(lines[:at])
    settings = {**_parse_pairs(lines[at]), **_parse_templates(lines[at + 1 :])}
    return Infotext(
        prompt=prompt,
        negative_prompt=negative,
        settings=settings,
        lora_hashes=parse_hashes(settings.get("Lora hashes", "")),
        ti_hashes=parse_hashes(settings.get("TI hashes", "")),
        model=settings.get("Model", ""),
        model_hash=settings.get("Model hash", ""),
    )


def quote_value(value: str) -> str:
    """Quote a value as A1111 does: as a JSON string if it would not be parsed back unchanged."""
    plain = value == value.strip() != "" and not value.startswith('"') and not re.search("[,:\n]", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def split_lines(text: str) -> list[str]:
    """Split a text at Unix and Windows line endings."""
    return text.replace("\r\n", "\n").split("\n")


def find_settings_line(lines: Sequence[str]) -> int | None:
    """Return the index of the settings line, the last line with at least three `key: value` pairs, or None.

    Only blank lines and the templates of A1111's Dynamic Prompts extension may follow it. If other text follows, the
    line belongs to the prompt.
    """
    at_end = True
    for at in range(len(lines) - 1, -1, -1):
        template = _is_template(lines[at])
        if at_end and not template and len(_parse_pairs(lines[at])) >= _MIN_PAIRS:
            return at
        if lines[at].strip():
            at_end = template
    return None


def _is_template(line: str) -> bool:
    return line.startswith(tuple(f"{key}:" for key in _TEMPLATES))


def _parse_templates(lines: Sequence[str]) -> dict[str, str]:
    """Parse the templates below the settings line, each of which extends to the next one."""
    found: dict[str, str] = {}
    for line in lines:
        if _is_template(line):
            key, _, value = line.partition(":")
            found[key] = value
        elif found:
            found[list(found)[-1]] += f"\n{line}"
    return {key: value.strip() for key, value in found.items()}


def _parse_prompts(lines: Sequence[str]) -> tuple[str, str]:
    """Split lines into the prompt and the negative prompt, which extends from its label to the end."""
    labeled = (at for at, line in enumerate(lines) if line.lstrip().startswith(_NEGATIVE))
    start = next(labeled, len(lines))
    negative = "\n".join(lines[start:]).lstrip().removeprefix(_NEGATIVE).removeprefix(" ")
    return "\n".join(lines[:start]), negative


def _parse_pairs(line: str) -> dict[str, str]:
    """Parse the comma-separated `key: value` pairs of a line. The last of equal keys is used, as in A1111.

    Unlike in A1111, a key must be at the start of the line or follow a comma, so that emphasis such as
    `(masterpiece:1.2)` is not a key.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(line):
        end = at
        if key := _KEY.match(line, at):
            found[key[1].strip()], end = _read_value(line, key.end())
        at = _find_comma(line, end) + 1
    return found


def _read_value(line: str, start: int) -> tuple[str, int]:
    """Return the unquoted value that begins at `start`, and the index of its end."""
    end = _find_closing(line, start)
    if end is None or not _VALUE_END.match(line, end):
        end = _find_comma(line, start)
    return _unquote_value(line[start:end].strip()), end


def _find_comma(line: str, start: int) -> int:
    """Return the index of the next comma, or the end of the line."""
    at = line.find(",", start)
    return len(line) if at < 0 else at


def _find_closing(line: str, start: int) -> int | None:
    """Return the end of the JSON string, list or object at `start`, or None; its commas do not separate pairs."""
    if line.startswith('"', start):
        match = _STRING.match(line, start)
        return match.end() if match else None
    if line.startswith(("{", "["), start):
        try:
            return start + json.JSONDecoder().raw_decode(line[start : start + _MAX_TABLE_LENGTH])[1]
        except (ValueError, RecursionError):
            return None
    return None


def _unquote_value(text: str) -> str:
    if not _STRING.fullmatch(text):
        return text
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        return text


def parse_hashes(text: str) -> dict[str, str]:
    """Parse hashes by name from `a: 12hex, b: 12hex`. A name may contain commas and colons."""
    found: dict[str, str] = {}
    pending: list[str] = []
    for part in text.split(","):
        name, _, value = part.rpartition(":")
        if name and _HASH.fullmatch(value):
            found[",".join([*pending, name]).strip()] = value.strip()
            pending = []
        else:
            pending.append(part)
    return found


def convert_settings(info: Infotext, *, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Convert an infotext to settings of `GenerateConfig`.

    Args:
        info: Parsed infotext.
        source: Name of the image, for error messages.

    Returns:
        The settings, with adapter tags still in the prompt, and one sentence for each difference from the original
        image that is to be expected.

    Raises:
        ConfigError: If values are invalid; the message lists all of them.
    """
    values = {key.lower(): value for key, value in info.settings.items()}
    table: dict[str, Any] = {"prompt": info.prompt, "negative_prompt": info.negative_prompt}
    plain = {**_FIELDS, **_VARIATION}
    table |= {name: values[key.lower()] for name, key in plain.items() if key != "Size" and key.lower() in values}
    if table.get("variation", "0").strip("0.") == "":  # a variation of strength 0 has no effect
        table = {name: value for name, value in table.items() if name not in _VARIATION}
    table |= _parse_size(values, source)
    scheduler, notes = _parse_sampler(values)
    if scheduler:
        table["scheduler"] = scheduler
    try:
        config = GenerateConfig.model_validate(table)
    except ValidationError as error:
        errors = "; ".join(_describe_error(dict(item), values) for item in error.errors())
        raise ConfigError(f"{source}: {errors}") from None
    return config.model_dump(include=set(table)), (
        *notes,
        *_describe_missing(values),
        *_describe_unsupported(info.settings),
    )


def _parse_size(values: Mapping[str, str], source: str) -> dict[str, str]:
    """Return the settings `width` and `height`, or nothing if the infotext has no size."""
    if "size" not in values:
        return {}
    match = _SIZE.fullmatch(values["size"])
    if not match:
        raise ConfigError(f"{source}: 'Size' is {values['size']!r}: expected width and height such as 512x768")
    return {"width": match[1], "height": match[2]}


def _describe_error(item: Mapping[str, Any], values: Mapping[str, str]) -> str:
    """Describe one validation error with the key of the infotext instead of the field of `GenerateConfig`."""
    name = str(item["loc"][0])
    key = {**_FIELDS, **_VARIATION}.get(name, name)
    about = f"{name} " if key == "Size" else ""
    reason = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{key!r} is {_shorten_value(values.get(key.lower(), str(item['input'])))!r}: {about}{reason}"


def _parse_sampler(values: Mapping[str, str]) -> tuple[Scheduler | None, list[str]]:
    """Return the scheduler, or None if it is not supported, and sentences on the differences to be expected."""
    name = values.get("sampler", "")
    kind, schedule = _split_sampler(name)
    schedule = values.get("schedule type", values.get("scheduler", schedule))
    scheduler = _SAMPLERS.get(kind)
    notes: list[str] = []
    if name and not scheduler:
        notes.append(
            f"Sampler: {_shorten_value(name)}: is not supported, so the scheduler of the base is used and the pixels "
            "differ."
        )
    if schedule.lower() not in _DEFAULT_SCHEDULES:
        notes.append(
            f"Schedule: {_shorten_value(schedule)}: is not supported, so the sampler's default steps are used and the "
            "pixels differ."
        )
    # A1111 generates noise on the GPU by default. ComfyUI and this project, whose sampler names are in lower case,
    # generate it on the CPU.
    noise = values.get("rng", "CPU" if name == name.lower() else "GPU")
    if noise.upper() != "CPU":
        notes.append(
            f"RNG: {_shorten_value(noise)}: the initial noise is generated on the CPU here, so the pixels differ."
        )
    return scheduler, notes


def _split_sampler(name: str) -> tuple[str, str]:
    """Split a name such as `DPM++ 2M Karras` or `k_euler_a` into sampler and schedule, in lower case."""
    lower = name.lower().replace("_", " ").strip().removeprefix("k ")
    for schedule in _SCHEDULES:
        if lower.endswith(f" {schedule}"):
            return lower.removesuffix(schedule).strip(), schedule
    return lower, ""


def _describe_missing(values: Mapping[str, str]) -> list[str]:
    keys = [key for key in dict.fromkeys([*_FIELDS.values(), "Sampler"]) if key.lower() not in values]
    return [f"{key}: missing in the image, so the default is used and the pixels may differ." for key in keys]


def _describe_unsupported(settings: Mapping[str, str]) -> list[str]:
    """Describe unsupported settings, one sentence for all whose keys begin with the same word."""
    known = {key.lower() for key in (*_FIELDS.values(), *_VARIATION.values())}.union(_IGNORED_KEYS)
    groups: dict[str, list[str]] = {}
    for key, value in settings.items():
        # A1111 writes Clip skip 1 if no layer is skipped
        if key.lower() not in known and (key.lower(), value) != ("clip skip", "1"):
            groups.setdefault(key.lower().split()[0], []).append(f"{key}: {_shorten_value(value)}")
    return [
        f"{', '.join(group)}: {_UNSUPPORTED.get(word, 'not supported')}, so the pixels may differ."
        for word, group in groups.items()
    ]


def _shorten_value(value: str) -> str:
    """Shorten a value to one line for a message."""
    line = " ".join(value.split())
    return line if len(line) <= _MAX_QUOTE_LENGTH else f"{line[:_MAX_QUOTE_LENGTH]}…"
