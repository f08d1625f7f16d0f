"""How other programs say how a picture was made, read: the text that A1111 and Forge keep in it.

    a lighthouse at night <lora:ink:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, Lora hashes: "ink: 1585b50b9d7d"

It lies under the key `parameters` of a PNG, or in the EXIF UserComment of a JPEG or WebP. Programs differ in how they
write it, so what is understood is wide; what cannot be followed in a replay comes back as a sentence of its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from lora_diffusion.config.generate import GenerateConfig, Scheduler
from lora_diffusion.errors import ConfigError

KEY = re.compile(r"\s*(\w[\w \-/]+):\s*")
STRING = re.compile(r'"(?:\\.|[^\\"])*"')
VALUE_END = re.compile(r"\s*(?:,|\Z)")
HASH = re.compile(r"\s*[0-9A-Fa-f]+\s*")
SIZE = re.compile(r"(\d+) ?[xX×] ?(\d+)", re.ASCII)
NEGATIVE = "Negative prompt:"
TEMPLATES = ("Template", "Negative Template")
FEWEST_PAIRS = 3
LONGEST_QUOTE = 60
LONGEST_TABLE = 20_000  # characters; each attempt to read one may look at so many, and a line may hold as many attempts

FIELDS = {"seed": "Seed", "steps": "Steps", "guidance": "CFG scale", "width": "Size", "height": "Size"}
"""Our settings, and the keys that say them."""
VARIATION = {"variation_seed": "Variation seed", "variation": "Variation seed strength"}
"""The same of those that most pictures do not say."""

SAMPLERS: Mapping[str, Scheduler] = {
    **{name: name for name in get_args(Scheduler)},
    "euler a": "euler-ancestral",
    "euler ancestral": "euler-ancestral",
    "dpm++ 2m": "dpm++",
    "dpmpp 2m": "dpm++",
}
"""Samplers that exist here, by the names of A1111 and ComfyUI in small letters without underscores."""

SCHEDULES = (
    *("karras", "polyexponential", "exponential", "sgm uniform", "uniform", "simple", "normal", "beta", "turbo"),
    *("kl optimal", "align your steps", "automatic"),
)
"""What may follow a sampler's name; the first that fits is meant, so a longer name stands before its own ending."""

OWN_SCHEDULES = ("", "automatic", "uniform")
"""The steps that a sampler takes by itself, here as there."""

SILENT = (
    *("version", "model", "model hash", "vae hash", "lora hashes", "ti hashes", "hashes", "civitai resources"),
    *("civitai metadata", "created date", "user", "batch size", "batch pos", "template", "negative template"),
    *("sampler", "schedule type", "scheduler", "rng"),
)
"""Keys that change no pixel, or that have sentences of their own."""

MEANINGS = {
    "hires": "no second pass at a higher resolution is made",
    "adetailer": "nothing is found and painted again",
    "clip": "no layer of the text encoder is skipped",
    "denoising": "the picture starts from noise alone",
    "refiner": "no second model takes over",
    "vae": "the base's own VAE is used",
    "controlnet": "no ControlNet is used",
}
"""What happens instead, by the first word of a key."""


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """What a picture says about how it was made, as written there."""

    prompt: str
    negative_prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict[str, str])
    """Every pair of the settings line, in its order and spelling, values without their quotes."""
    lora_hashes: dict[str, str] = field(default_factory=dict[str, str])
    """Adapters by name: the first 12 hex digits of the SHA-256 over an adapter file's tensors."""
    ti_hashes: dict[str, str] = field(default_factory=dict[str, str])
    """The same for learned tokens (textual inversion)."""
    model: str = ""
    model_hash: str = ""


def parse_infotext(text: str, *, source: str) -> Infotext:
    """The parts of an infotext; Windows line ends become plain ones, all else stays as written.

    Raises ConfigError that names `source` if no settings line ends the text.
    """
    lines = split_lines(text)
    at = find_settings_line(lines)
    if at is None:
        raise ConfigError(
            f"{source}: its text has no line of settings; expected a last line such as 'Steps: 20, Sampler: Euler a, "
            "CFG scale: 7, Seed: 1, Size: 512x512', as A1111 and Forge write it (ComfyUI's JSON is not read)"
        )
    prompt, negative = parse_prompts(lines[:at])
    settings = {**parse_pairs(lines[at]), **parse_templates(lines[at + 1 :])}
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
    """The value as A1111 writes it: as a JSON string where it would not read back as it is."""
    plain = value == value.strip() != "" and not value.startswith('"') and not re.search("[,:\n]", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def split_lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")


def find_settings_line(lines: Sequence[str]) -> int | None:
    """The number of the last line with three pairs or more, if it ends the text.

    The prompt extension of A1111 may write its templates below it; any other text there is a prompt, so that the line
    only looks like settings.
    """
    ends = True
    for at in range(len(lines) - 1, -1, -1):
        template = is_template(lines[at])
        if ends and not template and len(parse_pairs(lines[at])) >= FEWEST_PAIRS:
            return at
        if lines[at].strip():
            ends = template
    return None


def is_template(line: str) -> bool:
    return line.startswith(tuple(f"{key}:" for key in TEMPLATES))


def parse_templates(lines: Sequence[str]) -> dict[str, str]:
    """Templates below the settings line, each up to the next one."""
    found: dict[str, str] = {}
    for line in lines:
        if is_template(line):
            key, _, value = line.partition(":")
            found[key] = value
        elif found:
            found[list(found)[-1]] += f"\n{line}"
    return {key: value.strip() for key, value in found.items()}


def parse_prompts(lines: Sequence[str]) -> tuple[str, str]:
    """The prompt and the negative prompt, which begins at its label and goes on to the end."""
    labeled = (at for at, line in enumerate(lines) if line.lstrip().startswith(NEGATIVE))
    start = next(labeled, len(lines))
    negative = "\n".join(lines[start:]).lstrip().removeprefix(NEGATIVE).removeprefix(" ")
    return "\n".join(lines[:start]), negative


def parse_pairs(line: str) -> dict[str, str]:
    """The `key: value` pairs of a line, separated by commas; of equal keys the last counts, as in A1111.

    A1111 looks for keys anywhere. Here they stand at the start or after a comma, so that emphasis such as
    `(masterpiece:1.2)` is none.
    """
    found: dict[str, str] = {}
    at = 0
    while at < len(line):
        end = at
        if key := KEY.match(line, at):
            found[key[1].strip()], end = read_value(line, key.end())
        at = find_comma(line, end) + 1
    return found


def read_value(line: str, start: int) -> tuple[str, int]:
    """The value that begins at `start`, without quotes, and where it ends."""
    end = find_closing(line, start)
    if end is None or not VALUE_END.match(line, end):
        end = find_comma(line, start)
    return unquote_value(line[start:end].strip()), end


def find_comma(line: str, start: int) -> int:
    """Where the next comma is, or the end of the line."""
    at = line.find(",", start)
    return len(line) if at < 0 else at


def find_closing(line: str, start: int) -> int | None:
    """The end of the string, list or table at `start`, whose commas separate no pairs; CivitAI writes such tables."""
    if line.startswith('"', start):
        match = STRING.match(line, start)
        return match.end() if match else None
    if line.startswith(("{", "["), start):
        try:
            return start + json.JSONDecoder().raw_decode(line[start : start + LONGEST_TABLE])[1]
        except (ValueError, RecursionError):
            return None
    return None


def unquote_value(text: str) -> str:
    if not STRING.fullmatch(text):
        return text
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        return text


def parse_hashes(text: str) -> dict[str, str]:
    """Names and hashes in `a: 12hex, b: 12hex`; a name may hold commas and colons."""
    found: dict[str, str] = {}
    waiting: list[str] = []
    for part in text.split(","):
        name, _, value = part.rpartition(":")
        if name and HASH.fullmatch(value):
            found[",".join([*waiting, name]).strip()] = value.strip()
            waiting = []
        else:
            waiting.append(part)
    return found


def convert_settings(info: Infotext, *, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What GenerateConfig has of it, tags still in the prompt, and one sentence on each thing that differs in a replay.

    Raises ConfigError that names every key whose value cannot be used.
    """
    written = {key.lower(): value for key, value in info.settings.items()}
    table: dict[str, Any] = {"prompt": info.prompt, "negative_prompt": info.negative_prompt}
    plain = {**FIELDS, **VARIATION}
    table |= {name: written[key.lower()] for name, key in plain.items() if key != "Size" and key.lower() in written}
    if table.get("variation", "0").strip("0.") == "":  # a strength of 0 says that there is none
        table = {name: value for name, value in table.items() if name not in VARIATION}
    table |= parse_size(written, source)
    scheduler, notes = parse_sampler(written)
    if scheduler:
        table["scheduler"] = scheduler
    try:
        config = GenerateConfig.model_validate(table)
    except ValidationError as error:
        mistakes = "; ".join(describe_mistake(dict(item), written) for item in error.errors())
        raise ConfigError(f"{source}: {mistakes}") from None
    return config.model_dump(include=set(table)), (
        *notes,
        *describe_missing(written),
        *describe_unsupported(info.settings),
    )


def parse_size(written: Mapping[str, str], source: str) -> dict[str, str]:
    """Width and height as texts, or nothing if the picture does not say them. Raises ConfigError."""
    if "size" not in written:
        return {}
    match = SIZE.fullmatch(written["size"])
    if not match:
        raise ConfigError(f"{source}: 'Size' is {written['size']!r}: expected width and height such as 512x768")
    return {"width": match[1], "height": match[2]}


def describe_mistake(item: Mapping[str, Any], written: Mapping[str, str]) -> str:
    """One mistake of a validation, in the words of the text rather than of GenerateConfig."""
    name = str(item["loc"][0])
    key = {**FIELDS, **VARIATION}.get(name, name)
    about = f"{name} " if key == "Size" else ""
    reason = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"{key!r} is {shorten_value(written.get(key.lower(), str(item['input'])))!r}: {about}{reason}"


def parse_sampler(written: Mapping[str, str]) -> tuple[Scheduler | None, list[str]]:
    """The sampler if it exists here, and sentences on how its pictures differ from those of the other program."""
    name = written.get("sampler", "")
    kind, schedule = split_sampler(name)
    schedule = written.get("schedule type", written.get("scheduler", schedule))
    scheduler = SAMPLERS.get(kind)
    notes: list[str] = []
    if name and not scheduler:
        notes.append(
            f"Sampler: {shorten_value(name)}: does not exist here, so the base's own is used and the pixels differ."
        )
    if schedule.lower() not in OWN_SCHEDULES:
        notes.append(f"Schedule: {shorten_value(schedule)}: the sampler's own steps are taken, so the pixels differ.")
    # A1111 draws its noise on the GPU unless it says otherwise; ComfyUI and this toolkit, whose names of samplers are
    # spelled differently, draw it on the CPU.
    noise = written.get("rng", "CPU" if name == name.lower() else "GPU")
    if noise.upper() != "CPU":
        notes.append(f"RNG: {shorten_value(noise)}: the starting noise is drawn on the CPU here, so the pixels differ.")
    return scheduler, notes


def split_sampler(name: str) -> tuple[str, str]:
    """A sampler's name in small letters and, where it ends in one, the schedule: `DPM++ 2M Karras`, `k_euler_a`."""
    small = name.lower().replace("_", " ").strip().removeprefix("k ")
    for schedule in SCHEDULES:
        if small.endswith(f" {schedule}"):
            return small.removesuffix(schedule).strip(), schedule
    return small, ""


def describe_missing(written: Mapping[str, str]) -> list[str]:
    keys = [key for key in dict.fromkeys([*FIELDS.values(), "Sampler"]) if key.lower() not in written]
    return [f"{key}: not said in the picture, so the default is used and the pixels may differ." for key in keys]


def describe_unsupported(settings: Mapping[str, str]) -> list[str]:
    """A sentence on each setting that nothing here follows; those with the same first word share one."""
    known = {key.lower() for key in (*FIELDS.values(), *VARIATION.values())}.union(SILENT)
    groups: dict[str, list[str]] = {}
    for key, value in settings.items():
        # Clip skip 1 is A1111's way to say that no layer is skipped
        if key.lower() not in known and (key.lower(), value) != ("clip skip", "1"):
            groups.setdefault(key.lower().split()[0], []).append(f"{key}: {shorten_value(value)}")
    return [
        f"{', '.join(group)}: {MEANINGS.get(word, 'nothing here does the same')}, so the pixels may differ."
        for word, group in groups.items()
    ]


def shorten_value(value: str) -> str:
    """A value for a message, on one line and not too long."""
    line = " ".join(value.split())
    return line if len(line) <= LONGEST_QUOTE else f"{line[:LONGEST_QUOTE]}…"
