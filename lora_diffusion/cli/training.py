"""The commands that train adapters: train, demo."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_diffusion.cli.flags import Changes, parse_changes, quiet, settings_table
from lora_diffusion.config import read_toml
from lora_diffusion.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train an adapter from captioned pictures."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")]
    """TOML file with the run's settings."""
    set: Changes = ()
    """Change one setting of the file."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        config = read_toml(self.config, TrainConfig, parse_changes(self.set))
        with quiet():
            from lora_diffusion.training.loop import train

            result = train(config)
        if not result.is_main_process:
            return
        facts = {"adapter": str(result.path), "first_loss": result.first_loss, "last_loss": result.last_loss}
        text = f"{result.path}: loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
        print(json.dumps(facts) if self.json else text)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the whole story on the embedded base: train, blend, merge, compare."""

    output: Path = Path("demo")
    """Folder for the grid, the adapter and the merged checkpoint; an earlier demo there is replaced."""
    steps: int = 0
    """Training steps; 0 takes the demo's own number."""

    def run(self) -> None:
        with quiet():
            from lora_diffusion.demo import run_demo

            run_demo(self.output, steps=self.steps, say=print)


Train.__doc__ = f"{Train.__doc__}\n\nSettings of the TOML file:\n{settings_table(TrainConfig)}"
