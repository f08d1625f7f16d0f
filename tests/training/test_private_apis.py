"""The private APIs of other libraries that training depends on; a new version that drops one fails here first."""

from collections.abc import Generator

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_diffusion.training.loop import new_accelerator


@pytest.fixture
def one_process_group() -> Generator[None]:
    """A process group with this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_accelerators_in_one_process_have_the_precision_they_ask_for() -> None:
    assert hasattr(AcceleratorState, "_reset_state"), (
        "Accelerate has no AcceleratorState._reset_state any more; find another way for `new_accelerator` in "
        "training/loop.py to change the precision within a process"
    )
    for precision in ("bf16", "no"):
        assert new_accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision


@pytest.mark.usefixtures("one_process_group")
def test_data_parallel_ignores_frozen_parameters() -> None:
    assert hasattr(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model"), (
        "PyTorch has no DistributedDataParallel._set_params_and_buffers_to_ignore_for_model any more; find another way "
        "for `shard_base` in training/sharding.py to exclude the frozen parameters"
    )
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight", "0.bias"])
    assert DistributedDataParallel(model).parameters_to_ignore == {"0.weight", "0.bias"}, (
        "DistributedDataParallel no longer ignores the parameters it is told to; find another way for `shard_base` in "
        "training/sharding.py to exclude the frozen parameters"
    )
