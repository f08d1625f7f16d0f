"""What a stopped run goes on from: whole or not there, and only for the run that it belongs to."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.config.settings import Settings
from lora_diffusion.core.atomic_files import atomic_folder
from lora_diffusion.errors import ConfigError

KEPT = 2
"""States on disk; the one before the last is removed once a newer one is whole."""
FREE_TO_CHANGE = ("output", "name", "save_every", "save_precision", "state_every", "resume", "samples", "tracking")
"""Settings with which a run is still the same one."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A run after so many optimizer steps. Data order and noise are functions of the step, and need no place here."""

    step: int
    losses: Sequence[float]
    """Of every step so far."""
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    average: Mapping[str, Any] | None
    """The moving average of the parameters, if there is one."""
    rules: Mapping[str, Any]
    """What the method needs to go on."""
    best: Mapping[str, Any]
    """What validation knows of the best step."""
    best_parameters: Mapping[str, Tensor] | None


def run_identity(config: Settings, **hashes: str) -> dict[str, Any]:
    """What makes a run the same run: settings that steps depend on, and hashes of base and data."""
    settings = config.model_dump(mode="json", exclude=set(FREE_TO_CHANGE))
    return {**settings, **hashes}


def save_state(folder: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Write a state beside the older ones, then remove all but the last few. Raises OutputError; older ones stay."""
    with atomic_folder(folder / state_name(state.step)) as part:
        (part / "run.json").write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        torch.save(vars(state), part / "state.pt")
    for older in list_states(folder)[:-KEPT]:
        shutil.rmtree(older, ignore_errors=True)


def load_state(folder: Path, identity: Mapping[str, Any]) -> TrainingState | None:
    """The newest state of this run; None if there is none.

    Raises ConfigError if there is one of another run, naming what differs.
    """
    found = list_states(folder)
    if not found:
        return None
    known = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
    odd = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
    if odd:
        raise ConfigError(
            f"{found[-1]}: is the state of a run with other settings ({', '.join(sorted(odd))} differ); set resume to "
            "false to begin anew, or give another output"
        )
    return TrainingState(**torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True))


def forget_states(folder: Path) -> None:
    """Remove all states, of a run that has ended or begins anew, and what a kill left between writing and renaming."""
    for path in (*list_states(folder), *folder.glob(".state-*")):
        shutil.rmtree(path, ignore_errors=True)


def list_states(folder: Path) -> list[Path]:
    """Whole states, the oldest first."""
    return sorted(path for path in folder.glob("state-*") if (path / "state.pt").is_file())


def state_name(step: int) -> str:
    return f"state-{step:08d}"
