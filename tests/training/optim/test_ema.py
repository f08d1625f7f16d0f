"""The moving average equals its formula, and swapping it in restores the parameters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_diffusion.training.optim.ema import MovingAverage, copy_values, swapped_parameters


def history(seed: int, steps: int) -> Tensor:
    return torch.randn(steps, 3, 4, generator=torch.Generator().manual_seed(seed))


def average_of(values: Tensor, decay: float) -> MovingAverage:
    average = MovingAverage(decay=decay)
    for value in values:
        average = average.update({"up": nn.Parameter(value.clone())})
    return average


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 30), decay=st.floats(0, 0.9999))
def test_average_equals_the_weighted_mean_of_all_steps(seed: int, steps: int, decay: float) -> None:
    values = history(seed, steps)
    weights = torch.tensor([decay ** (steps - 1 - i) for i in range(steps)], dtype=torch.float64)
    expected = (weights.view(-1, 1, 1) * values.double()).sum(0) / weights.sum()
    found = average_of(values, decay).means["up"]
    # each step rounds a few times, and the values are below 6
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=6 * 4 * steps * 2**-24)


def test_decay_zero_returns_the_last_parameters() -> None:
    values = history(0, 5)
    assert torch.equal(average_of(values, 0.0).means["up"], values[-1])


def test_update_does_not_change_the_previous_average() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    first = MovingAverage(decay=0.5).update({"up": parameter})
    with torch.no_grad():
        parameter.add_(1)
    second = first.update({"up": parameter})
    assert torch.equal(first.means["up"], torch.zeros(2)) and second.steps == 2
    assert not second.means["up"].requires_grad


@given(seed=st.integers(0, 2**32), at=st.integers(1, 9))
def test_resumed_average_is_bit_identical(seed: int, at: int) -> None:
    values = history(seed, 10)
    resumed = MovingAverage(**average_of(values[:at], 0.9).state_dict())
    for value in values[at:]:
        resumed = resumed.update({"up": value})
    straight = average_of(values, 0.9)
    assert resumed.steps == straight.steps and torch.equal(resumed.means["up"], straight.means["up"])


def test_parameters_are_restored_bit_for_bit_after_an_error() -> None:
    parameter = nn.Parameter(torch.tensor([0.1, -0.0, 1e-30, 3.7]))
    before, average = parameter.detach().clone(), MovingAverage(decay=0.5).update({"up": torch.ones(4)})
    with pytest.raises(RuntimeError, match="in the middle"), swapped_parameters({"up": parameter}, average):
        assert torch.equal(parameter, torch.ones(4))
        raise RuntimeError("in the middle")
    assert torch.equal(parameter.view(torch.int32), before.view(torch.int32))
    with swapped_parameters({"up": parameter}, MovingAverage(decay=0.5)):
        assert torch.equal(parameter, before)


def test_missing_name_changes_nothing() -> None:
    parameters = {"down": nn.Parameter(torch.zeros(2)), "up": nn.Parameter(torch.zeros(2))}
    average = MovingAverage(decay=0.5).update({"down": torch.ones(2)})
    with pytest.raises(KeyError, match="up"), swapped_parameters(parameters, average):
        pass
    with pytest.raises(KeyError, match="up"):
        copy_values(parameters, {"down": torch.ones(2)})
    assert not parameters["down"].any()
