"""The command line `lora-diffusion`, a thin layer over the library.

Each command's module is imported when that command is called, and heavy libraries when it runs, so that help is fast.
"""

import importlib
import os
import signal
import sys
from typing import Annotated, Any, Union

import tyro

from lora_diffusion.core.malloc import keep_freed_memory
from lora_diffusion.errors import LoRADiffusionError

COMMANDS = {
    "generate": ("generate", "Generate"),
    "grid": ("grid", "Grid"),
    "blocks": ("grid", "Blocks"),
    "preset": ("generate", "Preset"),
    "train": ("train", "Train"),
    "train style": ("train", "TrainStyle"),
    "train dreambooth": ("train", "TrainDreambooth"),
    "report": ("train", "Report"),
    "methods": ("methods", "Methods"),
    "dataset check": ("dataset", "Check"),
    "route": ("route", "Route"),
    "distill": ("distill", "Distill"),
    "merge": ("merge", "Merge"),
    "combine": ("combine", "Combine"),
    "resize": ("combine", "Resize"),
    "extract": ("extract", "Extract"),
    "approximate": ("extract", "Approximate"),
    "prune": ("prune", "Prune"),
    "convert": ("inspect", "Convert"),
    "inspect": ("inspect", "Inspect"),
    "verify": ("inspect", "Verify"),
    "analyze": ("analyze", "Analyze"),
    "library": ("inspect", "Library"),
    "library pack": ("pack", "Pack"),
    "library unpack": ("pack", "Unpack"),
    "demo": ("train", "Demo"),
    "ui": ("studio", "Ui"),
}
"""Module and class of each command, in the order of the help."""


def command_class(name: str) -> Any:
    """Return the class of a command, whose fields are its flags."""
    module, kind = COMMANDS[name]
    # import-linter does not see this import. Nothing is hidden by it: the commands belong to the layer `cli` like this
    # module, and their own imports are checked.
    return getattr(importlib.import_module(f"lora_diffusion.cli.commands.{module}"), kind)


def parse_command(arguments: list[str]) -> Any:
    """Parse the command line; exits after help, and with 2 for unknown commands and flags."""
    for num_words in (2, 1):
        name = " ".join(arguments[:num_words])
        if name in COMMANDS:
            kind = command_class(name)
            about = kind.describe_command() if hasattr(kind, "describe_command") else None
            return tyro.cli(kind, args=arguments[num_words:], prog=f"lora-diffusion {name}", description=about)
    all_commands: Any = Union[tuple(_summarize_command(name) for name in COMMANDS)]  # noqa: UP007 (built at run time)
    return tyro.cli(
        all_commands,
        args=arguments,
        prog="lora-diffusion",
        description="Train, blend, merge and convert LoRA adapters for Stable Diffusion.\n\n"
        "`lora-diffusion COMMAND --help` describes a command.",
    )


def _summarize_command(name: str) -> Any:
    """Return a command with the first line of its description, for the list of all commands."""
    kind = command_class(name)
    summary = kind.__doc__.partition("\n\n")[0]
    return Annotated[kind, tyro.conf.subcommand(name, description=summary)]


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, or 2 for invalid input, with one sentence on standard error. A command stopped by Ctrl-C or
        SIGTERM cleans up its temporary files and returns 130 or 143, as shells do.
    """
    command = parse_command(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        code = command.run() or 0
        sys.stdout.flush()
        return code
    except LoRADiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit does not fail again
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
    """Raised on SIGTERM, so that a command cleans up as it does after Ctrl-C."""


def _raise_terminated(_number: int, _frame: object) -> None:
    raise Terminated
