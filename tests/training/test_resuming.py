"""Resuming of stopped and killed runs: the result is identical, bit for bit, to that of an uninterrupted run."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.adapters.adapter import adapter_hash
from lora_diffusion.config.settings import deep_merge
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.training.checkpoint import list_states
from lora_diffusion.training.log import read_log
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.signals import StopRequest
from lora_diffusion.training.train import AdapterTrainer, train
from tests.helpers.forked_processes import run_training, start_forked
from tests.helpers.short_runs import settings

EVERYTHING: dict[str, Any] = {
    "data": {"crop": "random", "crop_zoom": 1.3, "flip": True, "variants": 2},
    "captions": {"dropout": 0.3},
    "adapter": {"dropout": 0.2, "max_delta_norm": 0.5},
    "optimizer": {"ema_decay": 0.9},
    "validation": {"share": 0.25, "every": 3, "draws": 2},
}
"""Settings that use every kind of state and randomness in a run."""


def stop_after(config: Any, steps: int) -> None:
    """Train until a step, then stop as Ctrl-C does, which saves the state."""
    trainer, request = AdapterTrainer(set_up(config), lambda *_: None), StopRequest()
    train_step = trainer.train_step

    def stopping_step() -> dict[str, Any]:
        facts = train_step()
        if trainer.step == steps:
            request.note(signal.SIGINT, None)
        return facts

    trainer.train_step = stopping_step  # type: ignore[method-assign]
    assert trainer.run(request)


@pytest.mark.parametrize("stops", [(1,), (4, 5)])
def test_a_stopped_run_resumes_bit_for_bit(stops: tuple[int, ...], pictures: Path, sd_folder: Path) -> None:
    changes = deep_merge(EVERYTHING, {"data": {"folder": str(pictures)}})
    whole = train(settings(pictures, sd_folder, changes, steps=8, save_precision="float32"))
    output = pictures.parent / "again" / "style.safetensors"
    config = settings(pictures, sd_folder, changes, steps=8, save_precision="float32", output=output)
    for steps in stops:
        stop_after(config, steps)
        assert not output.exists()
    resumed = train(config)
    assert adapter_hash(resumed.adapter) == adapter_hash(whole.adapter)
    assert resumed.best == whole.best
    assert (resumed.first_loss, resumed.last_loss) == (whole.first_loss, whole.last_loss)
    log = read_log(output.parent / "style-run" / "log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert [line["event"] for line in log if "event" in line] == ["stopped", "resumed"] * len(stops)
    assert not list_states(output.parent / "style-run")


def test_prior_and_drift_of_a_trained_text_encoder_do_not_depend_on_interruptions(
    pictures: Path, sd_folder: Path
) -> None:
    """The frozen side of prior loss and drift is encoded by the frozen text encoder, before and after resuming."""
    prior = {"mode": "prediction", "prompt": "a dog"}
    changes = {"prior": prior, "validation": {"share": 0.25, "every": 3, "draws": 2, "base_prompts": ["a blue house"]}}
    whole = train(settings(pictures, sd_folder, changes, steps=6, save_precision="float32"))
    output = pictures.parent / "again" / "style.safetensors"
    config = settings(pictures, sd_folder, changes, steps=6, save_precision="float32", output=output)
    stop_after(config, 4)
    resumed = train(config)
    assert adapter_hash(resumed.adapter) == adapter_hash(whole.adapter)
    logs = [read_log(result.path.parent / "style-run" / "log.jsonl") for result in (whole, resumed)]
    drifts = [[line["validation"]["drift"] for line in log if "validation" in line] for log in logs]
    assert drifts[0] == drifts[1]


def test_a_state_does_not_contain_the_frozen_base(pictures: Path, sd_folder: Path) -> None:
    config = settings(pictures, sd_folder, steps=8)
    stop_after(config, 2)
    (state,) = list_states(config.output.parent / "style-run")
    base = sum(path.stat().st_size for path in sd_folder.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in state.iterdir()) < base / 4
    parameters = torch.load(state / "state.pt", weights_only=True)["parameters"]
    assert {name.rpartition(".")[2] for name in parameters} == {"down", "up"}


def test_the_state_of_a_run_with_other_settings_is_refused(pictures: Path, sd_folder: Path) -> None:
    stop_after(settings(pictures, sd_folder, steps=8), 2)
    other = settings(pictures, sd_folder, {"adapter": {"rank": 3}}, steps=8, seed=9)
    with pytest.raises(ConfigError, match=r"other settings \(adapter, seed differ\); set resume to false"):
        train(other)
    fresh = train(settings(pictures, sd_folder, {"adapter": {"rank": 3}}, steps=8, seed=9, resume=False))
    assert fresh.steps == 8
    assert not list_states(fresh.path.parent / "style-run")


def test_the_state_of_another_version_is_refused(pictures: Path, sd_folder: Path) -> None:
    config = settings(pictures, sd_folder, steps=3)
    stop_after(config, 1)
    (state,) = list_states(config.output.parent / "style-run")
    run = json.loads((state / "run.json").read_text())
    del run["state_format"]  # states had no such field before it was introduced
    (state / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="saved by another version of lora_diffusion"):
        train(config)


def kill_runs(config: Any, *, kills: int, rng: random.Random) -> list[int]:
    """Start a run repeatedly, and kill it at a random time after a new step; return the steps it had reached."""
    log, reached = config.output.parent / "style-run" / "log.jsonl", [0]
    for _ in range(kills):
        process = start_forked(run_training, config)
        while process.is_alive() and last_step(log) <= reached[-1]:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        reached.append(last_step(log))
    return reached[1:]


def last_step(log: Path) -> int:
    return max((line["step"] for line in read_log(log) if "loss" in line), default=0) if log.is_file() else 0


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(pictures: Path, sd_folder: Path, drawn_seed: int) -> None:
    """kill -9 at random times, during a step or while a state is being written."""
    changes = deep_merge(EVERYTHING, {"data": {"folder": str(pictures)}})
    whole = train(settings(pictures, sd_folder, changes, steps=16, save_precision="float32"))
    output = pictures.parent / "again" / "style.safetensors"
    config = settings(pictures, sd_folder, changes, steps=16, save_precision="float32", output=output, state_every=1)
    reached = kill_runs(config, kills=2, rng=random.Random(drawn_seed))
    train(config)
    assert adapter_hash(load_adapter(output)) == adapter_hash(whole.adapter), reached
    assert not list((output.parent / "style-run").glob(".*")), "partial states are removed"


def test_settings_survive_a_round_trip_through_json(pictures: Path, sd_folder: Path) -> None:
    config = settings(pictures, sd_folder, EVERYTHING)
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config
