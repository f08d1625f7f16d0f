"""Save the state of a training run, and load it to resume the run.

A state is a folder `state-<step>` in the run's folder with two files: `state.pt` (the fields of `TrainingState`) and
`run.json` (the settings and hashes that identify the run). Folders are written atomically, so a killed run leaves
either a complete state or none.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.config.settings import Settings
from lora_diffusion.core.atomic_files import atomic_folder
from lora_diffusion.errors import ConfigError

_STATE_FORMAT = 2
"""Version of the files of a state, increased whenever the names of fields or parameters change."""
_MAX_STATES = 2
"""Number of states kept on disk. An older state is removed only after a newer one has been written completely."""
_IGNORED_SETTINGS = ("output", "name", "save_every", "save_precision", "state_every", "resume", "samples", "tracking")
"""Settings that may change between stopping and resuming a run, because no optimizer step depends on them."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """State of a training run after some number of optimizer steps.

    The data order and the noise are functions of the seed and the step, so they are not part of the state.
    """

    step: int
    """Number of optimizer steps done."""
    losses: Sequence[float] = field(repr=False)
    """Loss of every step so far."""
    parameters: Mapping[str, Tensor] = field(repr=False)
    """Trainable parameters by name, on the CPU."""
    optimizer: Mapping[str, Any] = field(repr=False)
    """State dict of the optimizer."""
    scaler: Mapping[str, Any] | None = field(repr=False)
    """State dict of the gradient scaler; None without fp16."""
    average: Mapping[str, Any] | None = field(repr=False)
    """State of the exponential moving average (EMA) of the parameters; None without EMA."""
    callbacks: Mapping[str, Any] = field(repr=False)
    """State dict of the training method's callbacks."""
    best: Mapping[str, Any]
    """Fields of `EarlyStopping`: the best validation so far."""
    best_parameters: Mapping[str, Tensor] | None = field(repr=False)
    """Parameters at the best validation, if they are to be saved at the end."""


def run_identity(config: Settings, **hashes: str) -> dict[str, Any]:
    """Return what identifies a run: the settings that its steps depend on, and the hashes of base and data."""
    settings = config.model_dump(mode="json", exclude=set(_IGNORED_SETTINGS))
    return {**settings, **hashes}


def save_state(folder: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Write a state to a run's folder, then remove the oldest states.

    Args:
        folder: The run's folder.
        state: The state to write.
        identity: The result of `run_identity`; `load_state` compares it.

    Raises:
        OutputError: If the state cannot be written. Earlier states remain.
    """
    with atomic_folder(folder / _state_name(state.step)) as part:
        run = {**identity, "state_format": _STATE_FORMAT}
        (part / "run.json").write_text(json.dumps(run, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        torch.save(vars(state), part / "state.pt")
    for path in list_states(folder)[:-_MAX_STATES]:
        shutil.rmtree(path, ignore_errors=True)


def load_state(folder: Path, identity: Mapping[str, Any]) -> TrainingState | None:
    """Load the newest state of a run; return None if there is no state.

    Raises:
        ConfigError: If the newest state was saved by another version, or belongs to a run with other settings, base or
            data. The message names the settings that differ.
    """
    states = list_states(folder)
    if not states:
        return None
    saved = json.loads((states[-1] / "run.json").read_text(encoding="utf-8"))
    if saved.pop("state_format", 1) != _STATE_FORMAT:
        raise ConfigError(
            f"{states[-1]}: cannot resume, because this state was saved by another version of lora_diffusion; finish "
            "the run with that version, or set resume to false to start over"
        )
    different = [key for key in {**saved, **identity} if saved.get(key) != identity.get(key)]
    if different:
        raise ConfigError(
            f"{states[-1]}: cannot resume, because this state was saved with other settings "
            f"({', '.join(sorted(different))} differ); set resume to false to start over, or choose another output"
        )
    return TrainingState(**torch.load(states[-1] / "state.pt", map_location="cpu", weights_only=True))


def forget_states(folder: Path) -> None:
    """Remove all states from a run's folder, including partial ones that a killed process left behind."""
    for path in (*list_states(folder), *folder.glob(".state-*")):
        shutil.rmtree(path, ignore_errors=True)


def list_states(folder: str | os.PathLike[str]) -> list[Path]:
    """List the folders of complete states, oldest first."""
    return sorted(path for path in Path(folder).glob("state-*") if (path / "state.pt").is_file())


def _state_name(step: int) -> str:
    return f"state-{step:08d}"
