"""Training runs in a separate process."""

import time
from pathlib import Path

import pytest

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError, DatasetError
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.backend.training_runs import TrainingJob, TrainingRuns


def wait_for_run(runs: TrainingRuns, name: str, *, steps: int = 0) -> str:
    """Return the status text when the run has ended, or has reached a number of steps."""
    for _ in range(3600):
        status = runs.get_status(name)
        if not status.running or (steps and len(status.losses) >= steps):
            return status.text
        time.sleep(0.05)
    raise AssertionError(runs.get_status(name).text)


def test_run_is_started_stopped_resumed_and_added_to_the_library(studio: Studio) -> None:
    runs = TrainingRuns(studio)
    source = sample_data_folder() / "styles" / "ink"
    captions = runs.add_files("my ink", [*sorted(source.glob("0[0-3].png")), *sorted(source.glob("0[0-2].txt"))])
    assert [caption == "" for _, caption in captions] == [False, False, False, True]
    with pytest.raises(DatasetError, match=r"03\.png"):
        runs.start(TrainingJob(name="my ink", base="tiny-sd", trigger_word="sks"))
    runs.write_captions("my ink", [["03.png", "a purple bird, in sks style"]])
    job = TrainingJob(
        name="my ink", base="tiny-sd", trigger_word="sks", steps=12, settings="state_every=1\nbatch_size=1"
    )
    runs.start(job)
    with pytest.raises(ConfigError, match="is in progress"):
        runs.start(job)
    wait_for_run(runs, "my ink", steps=2)
    runs.stop()
    assert wait_for_run(runs, "my ink").startswith(("Stopped at step", "Finished"))
    runs.start(job)
    assert wait_for_run(runs, "my ink").startswith("Finished: step 12 of 12")
    assert runs.get_status("my ink").report
    assert runs.add_to_library("my ink") == "my ink.safetensors"
    assert "my ink" in [card.title for card in studio.list_cards("tiny-sd")]
    with pytest.raises(ConfigError, match="is already in the library"):
        runs.add_to_library("my ink")


def test_failed_run_reports_the_error(studio: Studio) -> None:
    runs = TrainingRuns(studio)
    runs.add_files("bad", sorted((sample_data_folder() / "styles" / "ink").glob("00.*")))
    runs.start(TrainingJob(name="bad", base="tiny-sd", steps=2, settings="adapter.rank=-3"))
    assert "adapter.rank" in wait_for_run(runs, "bad")
    for setting in ("output=/etc/x.safetensors", "data.cache_folder=/tmp", "optimizer.kind=os.system", "base=/etc"):
        with pytest.raises(ConfigError, match="cannot be set from the studio"):
            runs.command_arguments(TrainingJob(name="bad", base="tiny-sd", settings=setting))


def test_files_that_are_not_images_are_refused(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "evil.png").write_text("<script>")
    with pytest.raises(ConfigError, match=r"evil\.png cannot be read as an image"):
        TrainingRuns(studio).add_files("x", [tmp_path / "evil.png"])
