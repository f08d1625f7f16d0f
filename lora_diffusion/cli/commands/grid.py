"""The commands `grid` and `blocks`, which compare images."""

import inspect
import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from lora_diffusion.cli.commands.generate import Generate
from lora_diffusion.cli.flags import quiet_libraries
from lora_diffusion.config.generate import GRID_SETTINGS
from lora_diffusion.core.tables import format_table


@dataclass(frozen=True, kw_only=True)
class Grid(Generate):
    """Draw an XY grid: one image for each combination of values of two settings.

    Values are separated by commas, prompts by `|`. ADAPTER is an adapter's file name without suffix, or its number
    (default: the first). The images are written to the output folder, and the grid, with all recipes inside, to its
    folder `grids`.
    """

    across: Annotated[str, tyro.conf.arg(metavar="WHAT[:ADAPTER]=VALUES")]
    """Horizontal axis, such as `weight:neon=0,0.5,1`."""
    down: Annotated[str, tyro.conf.arg(metavar="WHAT[:ADAPTER]=VALUES", help_behavior_hint="(default: one row)")] = ""
    """Vertical axis, such as `seed=0,1,2`."""

    @classmethod
    def describe_command(cls) -> str:
        """Return the description for the command's own help, with the settings that can vary."""
        names = ", ".join(name.replace("_", "-").replace(" ", "-") for name in GRID_SETTINGS)
        return f"{inspect.getdoc(cls)}\n\nWHAT is one of {names}."

    def run(self) -> None:
        """Run the command."""
        with quiet_libraries():
            from lora_diffusion.workflows.images.grid import draw_grid
            from lora_diffusion.workflows.images.grid_axes import GridAxis, parse_axis

            resolver = self.load.resolver()
            across, down = parse_axis(self.across), parse_axis(self.down) if self.down else GridAxis()
            drawn = draw_grid(self.make_request(resolver), across, down, self.output, self.load.config(), resolver)
        for note in drawn.notes:
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps(str(drawn.path)) if self.json else drawn.path)


@dataclass(frozen=True, kw_only=True)
class Blocks(Generate):
    """Measure the effect of each block of an adapter on the image, by leaving out one block at a time.

    Prints each block, the mean absolute change of the pixels (0 to 255) and the image without the block, strongest
    first.
    """

    of: Annotated[str, tyro.conf.arg(metavar="ADAPTER", help_behavior_hint="(default: the first)")] = ""
    """Adapter to measure: its file name without suffix, or its number."""

    def run(self) -> None:
        """Run the command."""
        with quiet_libraries():
            from lora_diffusion.workflows.images.grid import measure_blocks

            resolver = self.load.resolver()
            effects = measure_blocks(self.make_request(resolver), self.of, self.output, self.load.config(), resolver)
        if self.json:
            print(json.dumps([{**asdict(effect), "path": str(effect.path)} for effect in effects]))
        else:
            rows = [[effect.block, f"{effect.change:.2f}", str(effect.path)] for effect in effects]
            print(format_table(["block", "change", "image"], rows, left=(0, -1)))
