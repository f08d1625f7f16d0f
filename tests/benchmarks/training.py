"""What a training step costs: against the frozen network's own passes, and PEFT's modules.

    python tests/benchmarks/training.py

SD 1.5's UNet with random weights in float32, 32x32 latents, batch 1, rank 8 on its 128 attention projections. The floor
is the frozen UNet's forward and its backward to the input. Processor time of one thread, medians of rounds in turn;
operations as torch counts them; memory is what autograd keeps between the passes, parameters left out. Writes
`training.json` beside this script.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from full_size import attention_paths, base_around, new_unet
from measuring import machine
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lora_diffusion.train_config import AdapterConfig
from lora_diffusion.training.low_rank_layers import inject

RANK, ROUNDS = 8, 5


def inputs(*, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 32, 32, generator=rng), torch.randn(1, 77, 768, generator=rng)
    return latents.requires_grad_(learns), torch.tensor([500]), text


def step(unet: Any, *, learns: bool) -> None:
    """Forward and backward, as far as something learns."""
    latents, timestep, text = inputs(learns=learns)
    unet(latents, timestep, encoder_hidden_states=text).sample.square().mean().backward()


def floor() -> tuple[Any, bool]:
    """The frozen UNet, whose input learns."""
    return new_unet("sd1"), True


def ours() -> tuple[Any, bool]:
    unet = new_unet("sd1")
    base = base_around(unet, "sd1")
    base.pipe.text_encoder = torch.nn.Identity()
    inject(base, attention_paths(base), AdapterConfig(rank=RANK), seed=0)
    return unet, False


def pefts() -> tuple[Any, bool]:
    unet = new_unet("sd1")
    targets = [path.removeprefix("unet.") for path in attention_paths(base_around(unet, "sd1"))]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), unet)
    return unet, False


def operations(unet: Any, *, learns: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        step(unet, learns=learns)
    return counter.get_total_flops()


def kept_mb(unet: Any, *, learns: bool) -> float:
    """What autograd keeps for the backward pass, each storage once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(unet, learns=learns)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1e6


def main() -> None:
    torch.set_num_threads(1)
    ways = {"floor": floor(), "ours": ours(), "peft": pefts()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (unet, learns) in ways.items():
            started = time.process_time()
            step(unet, learns=learns)
            taken[name].append(time.process_time() - started)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    counted = {name: operations(unet, learns=learns) for name, (unet, learns) in ways.items()}
    kept = {name: kept_mb(unet, learns=learns) for name, (unet, learns) in ways.items()}
    facts = {
        "machine": machine(),
        "rounds": ROUNDS,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times_floor": {name: round(seconds[name] / seconds["floor"], 3) for name in ("ours", "peft")},
        "gflops": {name: round(value / 1e9, 1) for name, value in counted.items()},
        "kept_mb": {name: round(value, 1) for name, value in kept.items()},
        "kept_of_peft": round(kept["ours"] / kept["peft"], 3),
        "operations_of_floor": {name: round(counted[name] / counted["floor"], 3) for name in ("ours", "peft")},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
