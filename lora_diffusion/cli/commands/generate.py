"""The commands `generate` and `preset`, which make images and save blend presets."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lora_diffusion.cli.blend_flags import (
    DEFAULT_QUANTIZATION,
    Adapters,
    BaseFlag,
    CompositionFlags,
    GenerateFlags,
    LoadFlags,
    QuantizeFlag,
    parse_adapters,
)
from lora_diffusion.cli.flags import Switch, describe_flag, given_settings, quiet_libraries
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendPreset, Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, validate
from lora_diffusion.core.tables import format_table
from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from lora_diffusion.library.references import AdapterResolver
    from lora_diffusion.workflows.images.request import GenerationRequest

Action = Literal["save", "list", "show", "check"]
"""Actions of the command `preset`."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate images from a base model and any blend of adapters.

    Tags in the prompt add adapters of the library: `<lora:neon:0.8:lbw=MIDD:start=0.2:stop=0.8>`.
    """

    settings: Annotated[GenerateFlags, tyro.conf.arg(name="")]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]
    load: Annotated[LoadFlags, tyro.conf.arg(name="")]
    base: BaseFlag = ""
    adapter: Adapters = ()
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base, adapters and settings are used; flags override its settings."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="IMAGE", help_behavior_hint="")] = None
    """Image to generate again, by the recipe or the A1111/Forge parameters in it; adapters are found by hash."""
    quantize: QuantizeFlag = DEFAULT_QUANTIZATION
    output: Path = Path("outputs")
    """Folder to write the images to (PNG)."""
    json: Switch = False
    """Print the paths of the images as JSON."""

    def run(self) -> None:
        """Run the command."""
        with quiet_libraries():
            from lora_diffusion.workflows.images.generate import generate_files

            resolver = self.load.resolver()
            written = generate_files(self.make_request(resolver), self.output, self.load.config(), resolver)
        for note in written.notes:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps([str(p) for p in written.paths]) if self.json else "\n".join(map(str, written.paths)))

    def make_request(self, resolver: "AdapterResolver") -> "GenerationRequest":
        """Return the images to generate."""
        from lora_diffusion.workflows.images.request import GenerationRequest, request_from_image, request_from_preset

        settings, composition = given_settings(self.settings), given_settings(self.composition)
        adapters = parse_adapters(self.adapter)
        if self.from_:
            quantized = self.quantize != DEFAULT_QUANTIZATION
            if any((settings, composition, adapters, self.preset, self.load.balance, quantized)):
                raise ConfigError(
                    "--from repeats an image with its own settings; combine it only with --base, --library and --output"
                )
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

    `preset save FILE` writes the given adapters and settings, `preset list [FOLDER]` lists presets, `preset show FILE`
    prints one, and `preset check FILE` looks up every adapter by path and hash and exits with 1 if one is missing or
    has changed.
    """

    action: Annotated[
        Action, tyro.conf.Positional, tyro.conf.arg(metavar="save|list|show|check", help_behavior_hint="")
    ]
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]", help_behavior_hint="")] = Path()
    """Preset file, or for `list` a folder (default: the current one)."""
    settings: Annotated[GenerateFlags, tyro.conf.arg(name="")]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]
    load: Annotated[LoadFlags, tyro.conf.arg(name="")]
    adapter: Adapters = ()
    base: BaseFlag = ""
    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="IMAGE", help_behavior_hint="")] = None
    """Image whose blend and settings are saved; flags override its settings."""
    name: Annotated[str, describe_flag(BlendPreset, "name", hint="(default: the file's name)")] = ""
    description: Annotated[str, describe_flag(BlendPreset, "description")] = ""
    force: Switch = False
    """Replace an existing preset."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        if self.action != "save" and (
            given_settings(self.settings) or given_settings(self.composition) or self.adapter or self.from_
        ):
            raise ConfigError(f"preset {self.action} takes no adapters and no settings; only `preset save` does")
        with quiet_libraries():
            return {"save": self.save, "list": self.list, "show": self.show, "check": self.check}[self.action]()

    def save(self) -> int:
        """Write a preset from the flags."""
        from lora_diffusion.workflows.images.generate import save_request_as_preset
        from lora_diffusion.workflows.images.request import request_from_settings

        resolver = self.load.resolver()
        request = request_from_settings(
            self.from_,
            base=self.base,
            settings=given_settings(self.settings),
            composition=given_settings(self.composition),
            adapters=parse_adapters(self.adapter),
            resolver=resolver,
        )
        saved = save_request_as_preset(
            request,
            self.path,
            self.load.config(),
            resolver,
            name=self.name,
            description=self.description,
            force=self.force,
        )
        for note in saved.notes:
            print(f"note: {note}", file=sys.stderr)
        print(saved.preset.model_dump_json(exclude_defaults=True) if self.json else f"{self.path}: saved")
        return 0

    def list(self) -> int:
        """Print the presets in a folder."""
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
        """Print one preset."""
        from lora_diffusion.library.presets import describe_preset, read_preset

        preset = read_preset(self.path)
        print(preset.model_dump_json(exclude_defaults=True) if self.json else describe_preset(preset))
        return 0

    def check(self) -> int:
        """Print whether each adapter of a preset is found, unchanged."""
        from lora_diffusion.workflows.images.presets import check_preset

        checks = check_preset(self.path, self.load.resolver(), self.load.ignore_unmatched)
        if self.json:
            print(json.dumps([{"what": what, "problem": problem} for what, problem in checks]))
        else:
            rows = [["FAILED" if problem else "ok", f"{what}{problem and ': '}{problem}"] for what, problem in checks]
            print(format_table([], rows, left=(0, 1)))
        return int(any(problem for _, problem in checks))
