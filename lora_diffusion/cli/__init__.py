"""The command line: a thin skin over the library. Heavy libraries are imported when a command runs, not before."""

import sys

import tyro

from lora_diffusion.allocator import keep_freed_memory
from lora_diffusion.cli.adapter_files import Convert, Inspect, Library, Verify
from lora_diffusion.cli.flags import parse_adapter as parse_adapter
from lora_diffusion.cli.pictures import Generate, Merge, Preset
from lora_diffusion.cli.training import Demo, Route, Train
from lora_diffusion.errors import LoRADiffusionError

COMMANDS = {
    "train": Train,
    "route": Route,
    "generate": Generate,
    "preset": Preset,
    "merge": Merge,
    "inspect": Inspect,
    "convert": Convert,
    "verify": Verify,
    "library": Library,
    "demo": Demo,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for bad input, with one sentence on standard error."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=arguments,
        prog="lora-diffusion",
        description="Train, blend, merge and convert LoRA adapters for Stable Diffusion.",
    )
    keep_freed_memory()
    try:
        return command.run() or 0
    except LoRADiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
