"""The commands that compare pictures: grid and blocks."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from lora_diffusion.cli.commands.generate import Generate
from lora_diffusion.cli.flags import quiet_libraries

Side = Annotated[str, tyro.conf.arg(metavar="WHAT[:ADAPTER]=VALUES")]


@dataclass(frozen=True, kw_only=True)
class Grid(Generate):
    """Draw one picture for each pair of values of two settings, side by side: an XY grid.

    WHAT is weight, block-preset, adapter, mode, seed, steps, guidance, scheduler, prompt or negative-prompt. Values
    have commas between them, prompts a `|`. ADAPTER is a file's name or its number; the first if not given. The
    pictures go into the output folder, the grid with all recipes inside into its folder `grids`.
    """

    across: Side
    """What changes from left to right: `weight:neon=0,0.5,1`."""
    down: Annotated[str, tyro.conf.arg(metavar="WHAT[:ADAPTER]=VALUES", help_behavior_hint="(default: nothing)")] = ""
    """What changes from top to bottom: `seed=0,1,2`."""

    def run(self) -> None:
        with quiet_libraries():
            from lora_diffusion.workflows.images.grid import draw_grid
            from lora_diffusion.workflows.images.grid_axes import GridAxis, parse_axis

            options = self.where.options()
            across, down = parse_axis(self.across), parse_axis(self.down) if self.down else GridAxis()
            drawn = draw_grid(self.make_request(options.resolver), across, down, self.output, options)
        for note in drawn.notes:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps(str(drawn.path)) if self.json else drawn.path)


@dataclass(frozen=True, kw_only=True)
class Blocks(Generate):
    """Leave out one block of an adapter at a time, and measure how much the picture changes, the strongest first.

    Prints each block, the mean change of a pixel (of 255) and the picture without it.
    """

    of: Annotated[str, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="(default: the first)")] = ""
    """Which adapter: its file's name, or its number."""

    def run(self) -> None:
        with quiet_libraries():
            from lora_diffusion.workflows.images.grid import measure_blocks

            options = self.where.options()
            effects = measure_blocks(self.make_request(options.resolver), self.of, self.output, options)
        if self.json:
            print(json.dumps([{**asdict(effect), "path": str(effect.path)} for effect in effects]))
        else:
            print("\n".join(f"{effect.block:<6}{effect.change:8.2f}  {effect.path}" for effect in effects))
