"""The command line: a thin skin over the library. Heavy libraries are imported when a command runs, not before.

Each command's own module is imported when that command is called, or when help asks for all.
"""

import importlib
import os
import signal
import sys
from typing import Any

import tyro

from lora_diffusion.core.malloc import keep_freed_memory
from lora_diffusion.errors import LoRADiffusionError

COMMANDS = {
    "dataset check": ("dataset", "Check"),
    "train": ("train", "Train"),
    "train style": ("train", "TrainStyle"),
    "train dreambooth": ("train", "TrainDreambooth"),
    "report": ("train", "Report"),
    "methods": ("methods", "Methods"),
    "route": ("route", "Route"),
    "generate": ("generate", "Generate"),
    "grid": ("grid", "Grid"),
    "blocks": ("grid", "Blocks"),
    "preset": ("generate", "Preset"),
    "merge": ("merge", "Merge"),
    "inspect": ("inspect", "Inspect"),
    "convert": ("inspect", "Convert"),
    "verify": ("inspect", "Verify"),
    "library": ("inspect", "Library"),
    "library pack": ("pack", "Pack"),
    "library unpack": ("pack", "Unpack"),
    "combine": ("combine", "Combine"),
    "resize": ("combine", "Resize"),
    "extract": ("extract", "Extract"),
    "approximate": ("extract", "Approximate"),
    "analyze": ("analyze", "Analyze"),
    "prune": ("prune", "Prune"),
    "distill": ("distill", "Distill"),
    "demo": ("train", "Demo"),
    "ui": ("studio", "Ui"),
}


def command_class(name: str) -> Any:
    """The class of a command: its flags are its fields."""
    module, kind = COMMANDS[name]
    return getattr(importlib.import_module(f"lora_diffusion.cli.commands.{module}"), kind)


def parse_command(arguments: list[str]) -> Any:
    """Parse the command line; help and mistakes end the program as tyro does."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            kind = command_class(name)
            about = kind.about() if hasattr(kind, "about") else None
            return tyro.cli(kind, args=arguments[words:], prog=f"lora-diffusion {name}", description=about)
    return tyro.extras.subcommand_cli_from_dict(
        {name: command_class(name) for name in COMMANDS},
        args=arguments,
        prog="lora-diffusion",
        description="Train, blend, merge and convert LoRA adapters for Stable Diffusion.",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for bad input, with one sentence on standard error.

    A command that is stopped by Ctrl-C or SIGTERM cleans up behind itself and ends with 130 or 143, as shells have it.
    """
    command = parse_command(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        code = command.run() or 0
        sys.stdout.flush()
        return code
    except LoRADiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left is flushed at exit
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Terminated:
        print("stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds a command as Ctrl-C does."""


def raise_terminated(_number: int, _frame: object) -> None:
    raise Terminated
