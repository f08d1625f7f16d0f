"""Measure what candidates for the embedded base's UNet and autoencoder cost: samples per CPU second in training.

    python -m train_scripts.tiny_base.compare_architectures --out train_scripts/tiny_base/architectures.json

One thread; forward and backward pass without the optimizer. CPU time is counted, so that other work on the machine
disturbs little; memory bandwidth is still shared. Compare figures of one run only.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from train_scripts.tiny_base.architecture import MAX_TOKENS, TEXT_WIDTH, build_unet, build_vae
from train_scripts.tiny_judge.statistics import describe_machine


@dataclass(frozen=True, kw_only=True)
class UnetCandidate:
    """Latent side, latent channels, channels and heads of each level."""

    side: int
    latents: int
    channels: tuple[int, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class VaeCandidate:
    """Latent channels, and channels of each level; each level but the last halves the picture."""

    latents: int
    channels: tuple[int, ...]


UNETS = (
    UnetCandidate(side=16, latents=16, channels=(48, 96, 192), heads=(3, 6, 6)),
    UnetCandidate(side=16, latents=24, channels=(64, 128, 224), heads=(2, 4, 7)),
    UnetCandidate(side=16, latents=16, channels=(32, 128, 256), heads=(1, 4, 8)),
    UnetCandidate(side=8, latents=64, channels=(128, 240), heads=(4, 8)),
    UnetCandidate(side=8, latents=64, channels=(128, 160, 192), heads=(4, 5, 6)),
    UnetCandidate(side=8, latents=64, channels=(96, 192, 256), heads=(3, 6, 8)),
)
VAES = (
    VaeCandidate(latents=16, channels=(16, 32, 64, 96)),
    VaeCandidate(latents=24, channels=(16, 32, 64, 128)),
    VaeCandidate(latents=24, channels=(32, 32, 64, 128)),
    VaeCandidate(latents=16, channels=(24, 48, 96, 128)),
    VaeCandidate(latents=64, channels=(16, 32, 64, 96, 128)),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def time_passes(step: Callable[[], None], samples: int, repeats: int) -> float:
    """Samples per CPU second, after one pass that is not counted."""
    step()
    started = time.process_time()
    for _ in range(repeats):
        step()
    return round(samples * repeats / (time.process_time() - started), 1)


def _prepare(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(memory_format=torch.channels_last).to(dtype).train()


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def time_unet(model: UNet2DConditionModel, candidate: UnetCandidate, dtype: torch.dtype, batch: int = 32) -> float:
    _prepare(model, dtype)
    noisy = torch.randn(batch, candidate.latents, candidate.side, candidate.side).to(dtype)
    t, context = torch.randint(0, 1000, (batch,)), torch.randn(batch, MAX_TOKENS, TEXT_WIDTH).to(dtype)

    def step() -> None:
        model(noisy.to(memory_format=torch.channels_last), t, context).sample.float().square().mean().backward()
        _clear(model)

    return time_passes(step, batch, 3)


def time_vae(model: AutoencoderKL, dtype: torch.dtype, batch: int = 8) -> float:
    _prepare(model, dtype)
    pictures = torch.randn(batch, 3, 128, 128).to(dtype).to(memory_format=torch.channels_last)

    def step() -> None:
        output = model.decode(model.encode(pictures).latent_dist.sample()).sample
        (output.float() - pictures).square().mean().backward()
        _clear(model)

    return time_passes(step, batch, 3)


def measure() -> dict:
    unets, vaes = [], []
    for candidate in UNETS:
        model = build_unet(candidate.side, candidate.latents, candidate.channels, candidate.heads)
        row = {"latents": f"{candidate.side}x{candidate.side}x{candidate.latents}", "channels": candidate.channels}
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row |= {name: time_unet(model, candidate, dtype) for name, dtype in DTYPES.items()}
        unets.append(row)
        print(row, flush=True)
    for candidate in VAES:
        model = build_vae(candidate.latents, candidate.channels)
        row = {"latent_channels": candidate.latents, "channels": candidate.channels}
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row |= {name: time_vae(model, dtype) for name, dtype in DTYPES.items()}
        vaes.append(row)
        print(row, flush=True)
    return {"unit": "samples per CPU second, forward and backward, one thread", "unets": unets, "vaes": vaes}


def main(out: Path) -> None:
    """Measure all candidates.

    Args:
        out: JSON file for the figures.
    """
    torch.set_num_threads(1)
    out.write_text(json.dumps({"machine": describe_machine(), **measure()}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
