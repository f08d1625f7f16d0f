"""The commands that make pictures: generate and preset."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lora_diffusion.cli.blend_flags import (
    Adapters,
    BaseFlag,
    CompositionFlags,
    GenerateFlags,
    LoadFlags,
    parse_adapters,
    set_flags,
)
from lora_diffusion.cli.flags import quiet_libraries
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, Quantization, validate
from lora_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make pictures from a base and any blend of adapters.

    Tags in the prompt call adapters of the library: `<lora:neon:0.8:lbw=MIDD:start=0.2:stop=0.8>`.
    """

    settings: Annotated[GenerateFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    where: Annotated[LoadFlags, tyro.conf.arg(name="")]
    base: BaseFlag = ""
    """`tiny-sd`, a folder in diffusers' layout, or a hub id."""
    adapter: Adapters = ()
    """Adapter and its weight, 1 if not given; options may follow, as in a prompt's tags."""
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base, adapters and settings are used."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="IMAGE", help_behavior_hint="")] = None
    """Picture to be made again: one of ours, or one of A1111 or Forge, whose adapters are found by their hashes."""
    quantize: Annotated[Quantization, tyro.conf.arg(metavar="none|nf4|fp4|int8")] = "none"
    """Keep the base's linear layers in four or eight bits, for a GPU that cannot hold them; needs bitsandbytes."""
    output: Path = Path("outputs")
    """Folder for the PNGs."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        with quiet_libraries():
            from lora_diffusion.workflows.images.generate import generate_files

            options = self.where.options()
            written = generate_files(self.make_request(options.resolver), self.output, options)
        for note in written.notes:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps([str(p) for p in written.paths]) if self.json else "\n".join(map(str, written.paths)))

    def make_request(self, resolver: Any) -> Any:
        """What to make, from the flags."""
        from lora_diffusion.workflows.images.request import GenerationRequest, request_from_image, request_from_preset

        settings, composition = set_flags(self.settings), set_flags(self.composition)
        adapters = parse_adapters(self.adapter)
        if self.from_:
            others = (settings, composition, adapters, self.preset, self.where.balance, self.quantize != "none")
            if any(others):
                raise ConfigError("--from makes a picture again as it was; give only --base, --library and --output")
            return request_from_image(self.from_, base=self.base, resolver=resolver)
        if self.preset:
            request = request_from_preset(
                self.preset, base=self.base, settings=settings, composition=composition, adapters=adapters
            )
            return replace(request, quantization=self.quantize)
        return GenerationRequest(
            base=self.base or EMBEDDED_BASE,
            entries=adapters,
            settings=validate(GenerateConfig, settings, source="generate"),
            composition=validate(Composition, composition, source="generate"),
            quantization=self.quantize,
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Save, list, show or check blend presets.

    `save FILE` writes the adapters and settings given; `list [FOLDER]`; `show FILE`; `check FILE` looks for every
    adapter by path and hash and exits with 1 if one is missing or has changed.
    """

    action: Annotated[
        Literal["save", "list", "show", "check"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="save|list|show|check", help_behavior_hint=""),
    ]
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]", help_behavior_hint="")] = Path()
    """File of the preset, or folder to list."""
    settings: Annotated[GenerateFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    where: Annotated[LoadFlags, tyro.conf.arg(name="")]
    adapter: Adapters = ()
    """Adapter to save, with its weight and options."""
    base: BaseFlag = ""
    """Base to save: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="IMAGE", help_behavior_hint="")] = None
    """Picture whose blend and settings are saved."""
    name: str = ""
    """Name of the preset; the file's if empty."""
    description: str = ""
    """What it is good for."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a preset that is there."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print as JSON."""

    def run(self) -> int:
        if self.action != "save" and (
            set_flags(self.settings) or set_flags(self.composition) or self.adapter or self.from_
        ):
            raise ConfigError(f"preset {self.action} takes no adapters and no settings; only `preset save` does")
        with quiet_libraries():
            return {"save": self.save, "list": self.list, "show": self.show, "check": self.check}[self.action]()

    def save(self) -> int:
        from lora_diffusion.workflows.images.generate import save_request_as_preset
        from lora_diffusion.workflows.images.request import request_from_settings

        settings, composition = set_flags(self.settings), set_flags(self.composition)
        options = self.where.options()
        request = request_from_settings(
            self.from_,
            base=self.base,
            settings=settings,
            composition=composition,
            adapters=parse_adapters(self.adapter),
            resolver=options.resolver,
        )
        saved = save_request_as_preset(
            request, self.path, options, name=self.name, description=self.description, force=self.force
        )
        for note in saved.notes:
            print(f"note: {note}", file=sys.stderr)
        print(saved.preset.model_dump_json(exclude_defaults=True) if self.json else f"{self.path}: saved")
        return 0

    def list(self) -> int:
        from lora_diffusion.library.presets import list_presets

        rows = list_presets(self.path)
        if self.json:
            print(json.dumps([{"file": str(p), "name": getattr(found, "name", "")} for p, found in rows]))
            return 0
        for path, found in rows:
            text = found if isinstance(found, str) else f"{found.name}: " + ", ".join(e.name for e in found.adapters)
            print(f"{path}  {text}")
        return 0

    def show(self) -> int:
        from lora_diffusion.library.presets import describe_preset, read_preset

        preset = read_preset(self.path)
        print(preset.model_dump_json(exclude_defaults=True) if self.json else describe_preset(preset))
        return 0

    def check(self) -> int:
        from lora_diffusion.workflows.images.presets import check_preset

        options = self.where.options()
        checks = check_preset(self.path, options.resolver, options.ignore)
        if self.json:
            print(json.dumps([{"what": what, "problem": problem} for what, problem in checks]))
        else:
            print(
                "\n".join(
                    f"{'ok' if not problem else 'NO':<4}{what}{problem and ': '}{problem}" for what, problem in checks
                )
            )
        return int(any(problem for _, problem in checks))
