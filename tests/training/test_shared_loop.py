"""The loop of adapters, distillation and gates, on a small model: equal to a plain PyTorch loop, and stoppable."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.errors import TrainingError
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.loop import TrainingTask, new_accelerator, run_to_end
from lora_diffusion.training.methods.callbacks import MethodCallbacks
from lora_diffusion.training.optim.optimizers import adam_settings

STEPS = 30


class Regression(nn.Module):
    """A linear regression with one squared error per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (functional.linear(x, self.weight) - y).square()


class Decay(MethodCallbacks):
    """An L2 penalty on the weights."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def penalty(self) -> Tensor:
        return 0.1 * self.weight.square().sum()


def batch_at(step: int, count: int = 4) -> Mapping[str, Any]:
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(count, 3, generator=rng)
    return {"x": x, "y": functional.linear(x, torch.tensor([2.0, 0.0, -3.0]))}


def make_task(model: Regression, **changes: Any) -> TrainingTask:
    settings: dict[str, Any] = {
        "name": "test",
        "model": model,
        "parameters": {"unet.weight": model.weight},
        "batches": lambda step: [(batch_at(step), 1.0)],
        "steps": STEPS,
        "optimizer": adam_settings(0.1, 1.0),
    }
    return TrainingTask(**{**settings, **changes})


def test_the_loop_equals_a_plain_one() -> None:
    """Adam with clipping, a penalty and a cosine schedule, as PyTorch's tutorials write it."""
    ours, plain = Regression(), Regression()
    run_to_end(make_task(ours, callbacks=Decay(ours.weight)))
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        loss = plain(**batch_at(step)).mean() + 0.1 * plain.weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert (ours.weight - Regression().weight).abs().max() > 0.5
    assert torch.allclose(ours.weight, plain.weight, rtol=0, atol=1e-6)


def test_any_task_accumulates_batches() -> None:
    whole, parts = Regression(), Regression()
    run_to_end(make_task(whole))

    def halves(step: int) -> list[tuple[Mapping[str, Any], float]]:
        batch = batch_at(step)
        return [({name: value[rows] for name, value in batch.items()}, 1.0) for rows in (slice(2), slice(2, 4))]

    accelerator = new_accelerator(mixed_precision="no", gradient_accumulation_steps=2)
    run_to_end(make_task(parts, batches=halves, accelerator=accelerator))
    assert torch.allclose(whole.weight, parts.weight, rtol=0, atol=1e-6)


def test_any_task_can_write_a_log(tmp_path: Path) -> None:
    run_to_end(make_task(Regression(), folder=tmp_path))
    lines = read_log(tmp_path / LOG)
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (lines[0]["rate"], lines[STEPS // 2]["rate"]) == (0.1, pytest.approx(0.05))


def test_a_loss_that_is_not_finite_stops_any_task_before_its_step() -> None:
    model = Regression()

    def batches(step: int) -> list[tuple[Mapping[str, Any], float]]:
        return [(batch_at(step), float("nan") if step == 2 else 1.0)]

    with pytest.raises(TrainingError, match="the loss at step 3 is nan"):
        run_to_end(make_task(model, batches=batches))
    assert bool(model.weight.isfinite().all())


class TerminatedError(Exception):
    """Raised by a handler of SIGTERM."""


def raise_terminated(*_: object) -> None:
    raise TerminatedError


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)])
def test_a_signal_reaches_the_previous_handler_after_a_whole_step(number: int, error: type[BaseException]) -> None:
    stopped, whole = Regression(), Regression()

    def batches(step: int) -> list[tuple[Mapping[str, Any], float]]:
        if step == 4:
            os.kill(os.getpid(), number)
        return [(batch_at(step), 1.0)]

    constant = adam_settings(0.1).model_copy(update={"schedule": "constant"})
    previous = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        with pytest.raises(error):
            run_to_end(make_task(stopped, batches=batches, optimizer=constant))
        assert signal.getsignal(signal.SIGTERM) is raise_terminated
    finally:
        signal.signal(signal.SIGTERM, previous)
    run_to_end(make_task(whole, steps=5, optimizer=constant))
    assert torch.equal(stopped.weight, whole.weight)
