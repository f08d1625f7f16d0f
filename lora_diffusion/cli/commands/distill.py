"""The command that makes one adapter of a blend by training it to predict the same: distill."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lora_diffusion.cli.blend_flags import (
    Adapters,
    BaseFlag,
    CompositionFlags,
    LoadFlags,
    parse_adapters,
    set_flags,
)
from lora_diffusion.cli.flags import optional_flags, quiet_libraries
from lora_diffusion.config.distillation import DistillConfig
from lora_diffusion.config.generate import SHORT_NAMES, GenerateConfig
from lora_diffusion.config.preset import Composition
from lora_diffusion.config.settings import EMBEDDED_BASE, validate

DistillFlags = optional_flags(DistillConfig, {"guidance_scale": SHORT_NAMES["guidance_scale"]})


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Make one adapter of a blend that is no sum, by a short training against what the blend predicts.

    Prints how far the adapter is from the blend on prompts and noise held out: 0 is the blend, 1 the base alone.
    """

    settings: Annotated[DistillFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    composition: Annotated[CompositionFlags, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    where: Annotated[LoadFlags, tyro.conf.arg(name="")]
    output: Path
    """The adapter file to write (.safetensors)."""
    base: BaseFlag = ""
    """`tiny-sd`, a folder in diffusers' layout, or a hub id."""
    adapter: Adapters = ()
    """Adapter and its weight, 1 if not given; options may follow, as in a prompt's tags."""
    preset: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Blend preset (JSON) whose base, adapters, mode, steps and guidance are used, such as a routed one."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: scenes)")] = None
    """Text file with one prompt a line; without it, scenes with the adapters' trigger words."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of captioned pictures, whose captions are the prompts."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace an output that is there."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON."""

    def run(self) -> int:
        with quiet_libraries():
            from lora_diffusion.workflows.training.distill import PromptSource, distill_file

            request = self.make_request()
            given = request.settings
            sampling = {"num_inference_steps": given.num_inference_steps, "guidance_scale": given.guidance_scale}
            config = validate(DistillConfig, {**sampling, **set_flags(self.settings)}, source="distill")
            source = PromptSource(file=self.prompts, folder=self.data)
            done = distill_file(request, source, config, self.output, self.where.options(), force=self.force)
        for note in done.notes:
            print(f"note: {note}", file=sys.stderr)
        report = done.result.report
        lines = [
            f"{done.path}: distilled in {done.result.seconds:.0f} s from {report.learned_from} predictions",
            f"distance from the blend on {report.measured_on} held-out predictions, the base's own being 1:",
            f"  {'SVD of the plain sum':<28}{report.plain_error:.4f}",
            f"  {'SVD of the mean over a run':<28}{report.start_error:.4f}",
            f"  {'distilled':<28}{report.error:.4f}",
        ]
        facts = {"output": str(done.path), "seconds": round(done.result.seconds, 1), **vars(report)}
        print(json.dumps(facts) if self.json else "\n".join(lines))
        return 0

    def make_request(self) -> Any:
        """What to distill, from the flags."""
        from lora_diffusion.workflows.images.request import GenerationRequest, request_from_preset

        composition, adapters = set_flags(self.composition), parse_adapters(self.adapter)
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
