"""The commands `train`, `train style`, `train dreambooth`, `report` and `demo`."""

import inspect
import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lora_diffusion.cli.flags import Changes, Switch, describe_flag, parse_changes, quiet_libraries, settings_table
from lora_diffusion.config.defaults import DefaultsConfig, GpuGigabytes, QuickTrainConfig
from lora_diffusion.config.settings import EMBEDDED_BASE, read_toml

if TYPE_CHECKING:
    from lora_diffusion.config.defaults import Purpose
    from lora_diffusion.config.train import TrainConfig


def _train_config_class() -> "type[TrainConfig]":
    """Import the settings of training only when needed: they are many, and would delay the help of all commands."""
    from lora_diffusion.config.train import TrainConfig

    return TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags of a training run, and the run itself."""

    set: Changes = ()
    """Change one setting of the run, such as steps=800 or adapter.rank=32."""
    json: Switch = False
    """Print the result as JSON."""
    dry_run: Switch = False
    """Check the data and train a few steps, to estimate the time and memory of the run; write nothing."""

    def train(self, config: "TrainConfig") -> int:
        """Train, or only estimate the run, and return the exit code."""
        return self.print_estimate(config) if self.dry_run else self.train_and_print(config)

    def print_estimate(self, config: "TrainConfig") -> int:
        """Print the estimated time and memory of a run."""
        with quiet_libraries():
            from lora_diffusion.workflows.training.dry_run import estimate_run, estimate_to_json, format_estimate

            needs = estimate_run(config)
        if needs.is_main_process:
            print(json.dumps(estimate_to_json(needs)) if self.json else format_estimate(needs, config))
        return 0

    def train_and_print(self, config: "TrainConfig") -> int:
        """Train and print the result."""
        with quiet_libraries():
            from lora_diffusion.workflows.training.run import train_and_report

            result = train_and_report(config)
        if not result.is_main_process:
            return 0
        if result.stopped:
            print(f"stopped after step {result.steps}; run the same command again to continue", file=sys.stderr)
            return 128 + signal.SIGINT
        facts = {
            "adapter": str(result.path),
            "steps": result.steps,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            "best": asdict(result.best) if result.best else None,
        }
        best = f", best after step {result.best.step}" if result.best else ""
        text = f"{result.path}: loss {result.first_loss:.4f} -> {result.last_loss:.4f}{best}"
        print(json.dumps(facts) if self.json else text)
        return 0


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an adapter from captioned images, with the settings of a TOML file.

    `train style FOLDER` and `train dreambooth FOLDER --instance "photo of sks dog"` need no file; see their --help.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml", help_behavior_hint="")]
    """TOML file with the settings, which are listed above."""
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")]

    @classmethod
    def describe_command(cls) -> str:
        """Return the description for the command's own help, with all settings of the file."""
        return f"{inspect.getdoc(cls)}\n\nSettings of the TOML file:\n{settings_table(_train_config_class())}"

    def run(self) -> int:
        """Run the command and return the exit code."""
        config = read_toml(self.config, _train_config_class(), parse_changes(self.run_flags.set))
        return self.run_flags.train(config)


@dataclass(frozen=True, kw_only=True)
class DefaultsFlags:
    """Flags from which the defaults of a run are chosen."""

    base: Annotated[str, describe_flag(DefaultsConfig, "base")] = EMBEDDED_BASE
    gpu_gb: Annotated[GpuGigabytes | None, describe_flag(DefaultsConfig, "gpu_gb")] = None

    def settings(self, purpose: "Purpose", given: Mapping[str, Any], changes: Changes) -> "TrainConfig":
        """Return the settings of a run: defaults for the purpose and base, overridden by what is given."""
        with quiet_libraries():
            from lora_diffusion.training.default_settings import make_settings

        return make_settings(purpose, given, parse_changes(changes), base=self.base, gigabytes=self.gpu_gb)


@dataclass(frozen=True, kw_only=True)
class TrainStyle:
    """Train a style from a folder of captioned images, with defaults for the base's family."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Folder of images, each with a caption in a .txt file of the same name."""
    output: Annotated[Path, describe_flag(QuickTrainConfig, "output")]
    defaults: Annotated[DefaultsFlags, tyro.conf.arg(name="")]
    trigger_words: Annotated[
        str, describe_flag(QuickTrainConfig, "trigger_words", short_name="trigger", metavar="WORDS")
    ] = ""
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Run the command and return the exit code."""
        given = {"data": {"folder": self.data}, "output": self.output, "trigger_words": self.trigger_words.split()}
        return self.run_flags.train(self.defaults.settings("style", given, self.run_flags.set))


@dataclass(frozen=True, kw_only=True)
class TrainDreambooth:
    """Train a subject from a few images of it (DreamBooth), with defaults for the base's family."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Folder of images of the subject; captions in .txt files replace the instance prompt."""
    output: Annotated[Path, describe_flag(QuickTrainConfig, "output")]
    instance_prompt: Annotated[
        str,
        describe_flag(QuickTrainConfig, "instance_prompt", short_name="instance", hint="(required)", metavar="PROMPT"),
    ]
    class_prompt: Annotated[str, describe_flag(QuickTrainConfig, "class_prompt", metavar="PROMPT")] = ""
    defaults: Annotated[DefaultsFlags, tyro.conf.arg(name="")]
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Run the command and return the exit code."""
        with quiet_libraries():
            from lora_diffusion.training.default_settings import subject_settings

        given = subject_settings(self.data, self.output, instance=self.instance_prompt, class_prompt=self.class_prompt)
        return self.run_flags.train(self.defaults.settings("dreambooth", given, self.run_flags.set))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report (HTML) of a finished training run again, from the files in its folder."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NAME-run", help_behavior_hint="")]
    """Folder of the run, beside its adapter."""

    def run(self) -> None:
        """Run the command."""
        with quiet_libraries():
            from lora_diffusion.workflows.training.run import write_report

        print(write_report(self.folder))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run a demonstration on the embedded base: train a style, blend it with a subject, merge both, compare images."""

    output: Path = Path("demo")
    """Folder for the grid, the adapter and the merged checkpoint; the files of an earlier demo are replaced."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: those of the demo)")] = None
    """Training steps."""

    def run(self) -> None:
        """Run the command."""
        with quiet_libraries():
            from lora_diffusion.workflows.demo import run_demo

            run_demo(self.output, steps=self.steps or 0, print_line=print)
