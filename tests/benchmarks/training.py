"""Cost of a training step, compared with the passes of the frozen network, and with PEFT's modules.

    python -m tests.benchmarks.training

SD 1.5's UNet with random weights in float32, 32x32 latents, batch 1, rank 8 on its 128 attention projections. The floor
is the forward pass of the frozen UNet and its backward pass to the input; "checkpointed" is this library with gradient
checkpointing. CPU time of one thread, medians of alternating rounds. Operations are calls that reach the device; memory
is the growth of a new process in its first step. Writes `training.json` beside this script.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.config.train import AdapterConfig
from lora_diffusion.training.methods.injection import inject
from tests.benchmarks.full_size import attention_paths, base_around, new_unet
from tests.benchmarks.goals import at_most, not_above, write_report
from tests.benchmarks.measuring import machine, status_mb

RANK, ROUNDS = 8, 5
GOALS = {
    "times_floor/ours": at_most(1.06),
    "operations_of_floor/ours": at_most(1.6),
    "added_of_peft/ours": at_most(0.9),
    "times_floor/checkpointed": not_above(1.327, tolerance=0.15),
    "operations_of_floor/checkpointed": not_above(2.414, tolerance=0.05),
    "added_of_peft/checkpointed": not_above(0.527, tolerance=0.1),
}


def inputs(*, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 32, 32, generator=rng), torch.randn(1, 77, 768, generator=rng)
    return latents.requires_grad_(learns), torch.tensor([500]), text


def step(unet: Any, *, learns: bool) -> None:
    """Run forward and backward, as far as there are trainable tensors."""
    latents, timestep, text = inputs(learns=learns)
    unet(latents, timestep, encoder_hidden_states=text).sample.square().mean().backward()


def floor() -> tuple[Any, bool]:
    """Run the frozen UNet with an input that requires a gradient."""
    return new_unet("sd1"), True


def ours() -> tuple[Any, bool]:
    unet = new_unet("sd1")
    base = base_around(unet, "sd1")
    base.pipe.text_encoder = torch.nn.Identity()
    inject(base, attention_paths(base), AdapterConfig(rank=RANK), seed=0)
    return unet, False


def checkpointed() -> tuple[Any, bool]:
    """Run this library with gradient checkpointing."""
    unet, learns = ours()
    unet.enable_gradient_checkpointing()
    unet.train()
    return unet, learns


def pefts() -> tuple[Any, bool]:
    unet = new_unet("sd1")
    targets = [path.removeprefix("unet.") for path in attention_paths(base_around(unet, "sd1"))]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), unet)
    return unet, False


class Counting(TorchDispatchMode):
    """Count the operations that reach the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(unet: Any, *, learns: bool) -> int:
    """Count the operations of a step, views included, since each costs a call."""
    with Counting() as counting:
        step(unet, learns=learns)
    return counting.count


def added_mb(way: str) -> float:
    """Return the growth of a new process in a step above its memory before the step, in MB."""
    command = [sys.executable, "-m", "tests.benchmarks.training", "--worker", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_growth(way: str) -> float:
    unet, learns = WAYS[way]()
    before = status_mb("VmRSS")
    step(unet, learns=learns)
    return status_mb("VmHWM") - before


WAYS = {"floor": floor, "ours": ours, "checkpointed": checkpointed, "peft": pefts}


def main() -> None:
    torch.set_num_threads(1)
    if "--worker" in sys.argv:
        return print(measure_growth(sys.argv[-1]))
    added = {name: statistics.median(added_mb(name) for _ in range(3)) for name in WAYS}
    ways = {name: make() for name, make in WAYS.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (unet, learns) in ways.items():
            started = time.process_time()
            step(unet, learns=learns)
            taken[name].append(time.process_time() - started)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    counted = {name: operations(unet, learns=learns) for name, (unet, learns) in ways.items()}
    facts = {
        "machine": machine(),
        "rounds": ROUNDS,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times_floor": {name: round(value / seconds["floor"], 3) for name, value in seconds.items()},
        "operations": counted,
        "added_mb": {name: round(value) for name, value in added.items()},
        "added_of_peft": {name: round(value / added["peft"], 3) for name, value in added.items()},
        "operations_of_floor": {name: round(value / counted["floor"], 3) for name, value in counted.items()},
    }
    sys.exit(write_report(Path(__file__).with_suffix(".json"), facts, GOALS))


if __name__ == "__main__":
    main()
