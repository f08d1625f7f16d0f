"""The status sentence of a training run."""

from pathlib import Path

import pytest

from lora_diffusion_studio.backend.training_status import format_status

LOG = [{"step": 1, "loss": 0.5, "seconds": 2.0}, {"step": 2, "loss": 0.25, "seconds": 4.0}]


@pytest.mark.parametrize(
    ("log", "running", "exit_code", "expected"),
    [
        ([], True, None, "Preparing the training data"),
        (LOG, True, None, "Training: step 2 of 12, loss 0.2500, 0:30 left"),
        ([], False, None, "Not started"),
        (LOG, False, None, "Not running; last at step 2 of 12, loss 0.2500"),
        (LOG, False, 0, "Finished: step 2 of 12, loss 0.2500"),
        (LOG, False, -15, "Stopped at step 2 of 12, loss 0.2500. Click Start training to resume."),
        ([], False, 143, "Stopped at step 0. Click Start training to resume."),
        (LOG, False, 2, "Failed: adapter.rank: must be positive"),
    ],
)
def test_status_of_a_run(
    log: list[dict[str, float]], running: bool, exit_code: int | None, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "output.log").write_text("loading\nerror: adapter.rank: must be positive\nbye\n")
    status = format_status(log, 12, running=running, exit_code=exit_code, output=tmp_path / "output.log")
    assert status == expected
