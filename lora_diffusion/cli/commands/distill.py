"""The command `distill`, which trains one adapter to imitate a blend."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_diffusion.cli.blend_flags import Adapters, BaseFlag, CompositionFlags, LoadFlags, parse_adapters
from lora_diffusion.cli.flags import Switch, given_settings, optional_flags, quiet_libraries
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import SHORT_NAMES, GenerateConfig
from lora_diffusion.config.preset import Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, validate
from lora_diffusion.core.tables import format_table

if TYPE_CHECKING:
    from lora_diffusion.workflows.images.request import GenerationRequest


class DistillFlags(
    optional_flags(DistillConfig, {"guidance_scale": SHORT_NAMES["guidance_scale"], "max_prompts": "most-prompts"})
):
    """Flags of the distillation settings."""


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train one adapter to predict what a blend predicts, for blends that are not a plain sum (switch, composite, ...).

    Prints the relative distance from the blend on held-out prompts and noise: 0 is the blend itself, 1 the base alone.
    """

    settings: Annotated[DistillFlags, tyro.conf.arg(name="")]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]
    load: Annotated[LoadFlags, tyro.conf.arg(name="")]
    output: Path
    """Adapter file to write (.safetensors)."""
    base: BaseFlag = ""
    adapter: Adapters = ()
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base, adapters, mode, steps and guidance are used, such as one written by `route`."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text file with one prompt per line; built-in scenes with the adapters' trigger words by default."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of captioned images whose captions are the prompts, instead of --prompts."""
    force: Switch = False
    """Replace an existing output file."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Run the command and return the exit code."""
        with quiet_libraries():
            from lora_diffusion.workflows.training.distill import PromptSource, distill_file

            request = self.make_request()
            image = request.settings
            sampling = {"num_inference_steps": image.num_inference_steps, "guidance_scale": image.guidance_scale}
            config = validate(DistillConfig, {**sampling, **given_settings(self.settings)}, source="distill")
            source = PromptSource(file=self.prompts, folder=self.data)
            done = distill_file(request, source, config, self.output, self.load.config(), force=self.force)
        for note in done.notes:
            print(f"note: {note}", file=sys.stderr)
        report = done.result.report
        if self.json:
            facts = {"output": str(done.path), "seconds": round(done.result.seconds, 1), **vars(report)}
            print(json.dumps(facts))
            return 0
        rows = [
            ["truncated SVD of the plain sum", f"{report.plain_error:.4f}"],
            ["truncated SVD of the mean over the steps", f"{report.start_error:.4f}"],
            ["distilled", f"{report.error:.4f}"],
        ]
        print(f"{done.path}: distilled in {done.result.seconds:.0f} s from {report.learned_from} predictions")
        print(f"relative distance from the blend on {report.measured_on} held-out predictions (1 is the base alone):")
        print(format_table([], rows))
        return 0

    def make_request(self) -> "GenerationRequest":
        """Return the blend to distill."""
        from lora_diffusion.workflows.images.request import GenerationRequest, request_from_preset

        composition, adapters = given_settings(self.composition), parse_adapters(self.adapter)
        if self.preset:
            no_prompt = {"prompt": ""}
            return request_from_preset(
                self.preset, base=self.base, settings=no_prompt, composition=composition, adapters=adapters
            )
        return GenerationRequest(
            base=self.base or EMBEDDED_BASE,
            entries=adapters,
            settings=GenerateConfig(prompt=""),
            composition=validate(Composition, composition, source="distill"),
        )
