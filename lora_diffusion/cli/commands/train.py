"""The commands that train adapters: train, train style, train dreambooth, report, demo."""

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lora_diffusion.cli.flags import Changes, parse_changes, quiet_libraries, settings_table
from lora_diffusion.config.settings import EMBEDDED_BASE, read_toml

if TYPE_CHECKING:
    from lora_diffusion.config.defaults import Purpose
    from lora_diffusion.config.train import TrainConfig


def train_config_class() -> "type[TrainConfig]":
    """Imported when it is asked for: a hundred settings take a while, which the help of all commands need not wait."""
    from lora_diffusion.config.train import TrainConfig

    return TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What is changed in a run's settings, and how its end is told."""

    set: Changes = ()
    """Change one setting; those of a section as SECTION.KEY."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check the data, take a few steps, and say how long the run would take and how much memory; keep nothing."""

    def train(self, config: "TrainConfig") -> int:
        """Do it and say what came of it."""
        return self.print_estimate(config) if self.dry_run else self.train_and_print(config)

    def print_estimate(self, config: "TrainConfig") -> int:
        with quiet_libraries():
            from lora_diffusion.workflows.training.dry_run import estimate_run, estimate_to_json, format_estimate

            needs = estimate_run(config)
        if needs.is_main_process:
            print(json.dumps(estimate_to_json(needs)) if self.json else format_estimate(needs, config))
        return 0

    def train_and_print(self, config: "TrainConfig") -> int:
        with quiet_libraries():
            from lora_diffusion.workflows.training.run import train_and_report

            result = train_and_report(config)
        if not result.is_main_process:
            return 0
        if result.stopped:
            print(f"stopped after step {result.steps}; the same command goes on from there", file=sys.stderr)
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
    """Train an adapter from captioned pictures: by a file of settings, or as a style or a subject with defaults.

    `train style FOLDER` and `train dreambooth FOLDER --instance "photo of sks dog"` need no file; see their --help.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")]
    """TOML file with the run's settings."""
    how: Annotated[RunFlags, tyro.conf.arg(name="")]

    @classmethod
    def about(cls) -> str:
        """What help says of this command alone."""
        return f"{cls.__doc__}\n\nSettings of the TOML file:\n{settings_table(train_config_class())}"

    def run(self) -> int:
        return self.how.train(read_toml(self.config, train_config_class(), parse_changes(self.how.set)))


@dataclass(frozen=True, kw_only=True)
class DefaultsFlags:
    """What the defaults of a run are chosen for."""

    base: str = EMBEDDED_BASE
    """Base to train on: `tiny-sd`, a folder in diffusers' layout, or a hub id."""
    gpu_gb: Literal[8, 12, 24] | None = None
    """Memory of the GPU; settings that save memory are chosen by it."""

    def settings(self, purpose: "Purpose", told: Mapping[str, Any], changes: Changes) -> "TrainConfig":
        with quiet_libraries():
            from lora_diffusion.training.presets import make_settings

        return make_settings(purpose, told, parse_changes(changes), base=self.base, gigabytes=self.gpu_gb)


@dataclass(frozen=True, kw_only=True)
class TrainStyle:
    """Train a style from a folder of captioned pictures, with defaults for the base's family."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Pictures, each with its caption in a .txt file of the same name."""
    output: Path
    """The adapter file to write (.safetensors)."""
    suited: Annotated[DefaultsFlags, tyro.conf.arg(name="")]
    trigger: str = ""
    """Word that calls the style, as it stands in the captions."""
    how: Annotated[RunFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        told = {"data": {"folder": self.data}, "output": self.output, "trigger_words": self.trigger.split()}
        return self.how.train(self.suited.settings("style", told, self.how.set))


@dataclass(frozen=True, kw_only=True)
class TrainDreambooth:
    """Train a subject from a few pictures of it, with defaults for the base's family."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
    """Pictures of the subject; captions in .txt files are used where there are any."""
    output: Path
    """The adapter file to write (.safetensors)."""
    instance: str
    """What the pictures show, with a word of the subject's own: "photo of sks dog"."""
    class_prompt: str = ""
    """What is to stay as it is: "photo of a dog"; the empty prompt if left out."""
    suited: Annotated[DefaultsFlags, tyro.conf.arg(name="")]
    how: Annotated[RunFlags, tyro.conf.arg(name="")]

    def run(self) -> int:
        with quiet_libraries():
            from lora_diffusion.training.presets import subject_settings

        told = subject_settings(self.data, self.output, instance=self.instance, class_prompt=self.class_prompt)
        return self.how.train(self.suited.settings("dreambooth", told, self.how.set))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the report of a run that has ended anew, from what is in its folder."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NAME-run", help_behavior_hint="")]
    """The run's folder, beside its adapter."""

    def run(self) -> None:
        with quiet_libraries():
            from lora_diffusion.workflows.training.run import write_report

        print(write_report(self.folder))


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole story on the embedded base: train, blend, merge, compare."""

    output: Path = Path("demo")
    """Folder for the grid, the adapter and the merged checkpoint; an earlier demo there is replaced."""
    steps: int = 0
    """Training steps; 0 takes the demo's own number."""

    def run(self) -> None:
        with quiet_libraries():
            from lora_diffusion.workflows.demo import run_demo

            run_demo(self.output, steps=self.steps, print_line=print)
