"""Memory of a training step with a quantized base, on the UNets of SD 1.5 and SDXL, compared with half precision.

    python -m tests.benchmarks.quantize

Random weights, 32x32 latents, batch 1, rank 16 on all attention and feed-forward layers, in a process of its own for
each data type: half precision (float16 on a GPU, bfloat16 on a CPU), nf4, fp4 and int8. "held" is the size of the
UNet's tensors; "peak" is the maximum memory of the process in its second step minus its memory before the UNet was
created. The error is that of the UNet's output. Writes `quantize.json` beside this script.
"""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.architectures.module_paths import trainable_paths
from lora_diffusion.architectures.targets import resolve_targets
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.models.load import Base, default_device, load_base
from lora_diffusion.models.quantize import quantize_base
from lora_diffusion.training.methods.injection import inject
from tests.benchmarks.full_size import base_around, new_unet
from tests.benchmarks.goals import not_above, write_report
from tests.benchmarks.measuring import machine, status_mb

RANK = 16
KINDS = ("half", "nf4", "fp4", "int8")
FAMILIES = ("sd1", "sdxl")
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
"""glibc gives freed memory back at once, so that a peak is what was needed."""
GOALS = {
    f"{family}/{kind}/{figure}": not_above(recorded, tolerance=tolerance)
    for family, kind, held, peak, error in (
        ("sd1", "nf4", 0.767, 0.834, 0.009),
        ("sd1", "fp4", 0.767, 0.834, 0.005),
        ("sd1", "int8", 0.843, 0.929, 0.003),
        ("sdxl", "nf4", 0.355, 0.479, 0.027),
        ("sdxl", "fp4", 0.355, 0.48, 0.066),
        ("sdxl", "int8", 0.565, 0.67, 0.006),
    )
    for figure, recorded, tolerance in (
        ("held_of_half", held, 0.02),
        ("peak_of_half", peak, 0.05),
        ("error", error, 0.2),
    )
}


def predicted(unet: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the UNet's output for a fixed noise."""
    rng = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    shapes = {"latents": (1, 4, 32, 32), "text": (1, 77, width), "text_embeds": (1, 1280), "time_ids": (1, 6)}
    made = {name: torch.randn(shape, generator=rng).to(device, dtype) for name, shape in shapes.items()}
    latents, text = made.pop("latents"), made.pop("text")
    timestep = torch.tensor([500], device=device)
    with torch.autocast(device.type, dtype):
        return unet(latents, timestep, encoder_hidden_states=text, added_cond_kwargs=made).sample.float()


def held_mb(unet: nn.Module) -> float:
    """Return the size of parameters, buffers and quantization constants in MB."""
    tensors = [*unet.parameters(), *unet.buffers()]
    weights = [module.weight for module in unet.modules() if isinstance(module, nn.Linear)]
    states = [weight.quant_state for weight in weights if hasattr(weight, "quant_state")]
    for state in states:
        tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def now_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status_mb("VmRSS")


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else status_mb("VmHWM")


@torch.no_grad()
def quantize_unet(base: Base, kind: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Quantize the UNet and return the relative change of its output."""
    wanted = predicted(base.pipe.unet, torch.device("cpu"), torch.bfloat16)
    quantize_base(base, kind, device)
    return float((predicted(base.pipe.unet, device, dtype).cpu() - wanted).norm() / wanted.norm())


def measured(family: str, kind: str) -> dict[str, float]:
    device = default_device()
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    torch.set_num_threads(1)
    load_base()  # libraries that are read on the way do not count
    before = now_mb(device)
    unet = new_unet(family, dtype)
    pipe = SimpleNamespace(unet=unet, text_encoder=nn.Identity(), text_encoder_2=nn.Identity(), to=unet.to)
    base = replace(base_around(unet, family), pipe=pipe)
    error = 0.0 if kind == "half" else quantize_unet(base, kind, device, dtype)
    unet.to(device)
    held = held_mb(unet)
    paths = resolve_targets(trainable_paths(base.layout), unet=("attention", "feed-forward"), text_encoders=())
    inject(base, paths, AdapterConfig(rank=RANK), seed=0)
    for _ in range(2):
        now_mb(device)
        forget_peak(device)
        predicted(unet, device, dtype).square().mean().backward()
    return {"held_mb": held, "peak_mb": peak_mb(device) - before, "error": error}


def in_own_process(family: str, kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.quantize", "--worker", family, kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVING_BACK)
    return {key: round(value, 3) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}


def of_family(family: str) -> dict[str, dict[str, float]]:
    found = {kind: in_own_process(family, kind) for kind in KINDS}
    for figures in found.values():
        for key in ("held_mb", "peak_mb"):
            figures[f"{key.removesuffix('_mb')}_of_half"] = round(figures[key] / found["half"][key], 3)
    return found


def main() -> None:
    if "--worker" in sys.argv:
        return print(json.dumps(measured(*sys.argv[-2:])))
    device = default_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    found = {family: of_family(family) for family in FAMILIES}
    facts = {"machine": machine(), "device": name, "rank": RANK, **found}
    sys.exit(write_report(Path(__file__).with_suffix(".json"), facts, GOALS))


if __name__ == "__main__":
    main()
