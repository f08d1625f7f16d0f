"""Stage one of the embedded base: the autoencoder, which caps everything that follows."""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from train_scripts.picture_world.compose import compose
from train_scripts.picture_world.scene import random_scene
from train_scripts.picture_world.styles.flat import render_flat
from train_scripts.picture_world.styles.random_styles import render_scribble
from train_scripts.tiny_base.architecture import new_vae
from train_scripts.tiny_base.optimizer import Bfloat16Copy, Ema, MuonWithAdamW, learning_rate_fraction
from train_scripts.tiny_base.vae_pictures import random_batch, to_tensor

KL_WEIGHT = 5e-4


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Root mean square per picture (what PSNR measures), L1 of values, of edges and of colors at a coarse scale.

    The coarse term keeps hues: without it a small autoencoder gives up magenta against green.
    """
    error = output - target
    rms = (error.square().mean(dim=(1, 2, 3)) + 1e-5).sqrt().mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = functional.avg_pool2d(error, 8).abs().mean()
    return rms + 0.5 * error.abs().mean() + 0.25 * edges + 0.5 * coarse


def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions and the mean KL term per latent element, through a sampled latent."""
    posterior = vae.encode(pictures).latent_dist
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return vae.decode(posterior.sample()).sample, kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB over (n, 3, h, w) pictures in -1..1."""
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in pictures.split(8)]
    error = ((torch.cat(parts) - pictures) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def probe_pictures() -> dict[str, Tensor]:
    """Held-out flat scenes and line art, for the log."""
    rng = np.random.default_rng(99)
    scenes = [random_scene(rng, held_out=True) for _ in range(24)]
    return {
        "flat_db": torch.stack([to_tensor(render_flat(compose(scene))) for scene in scenes]),
        "lines_db": torch.stack([to_tensor(render_scribble(rng)) for _ in range(16)]),
    }


def train_vae(out: Path, *, steps: int, batch: int, lr: float, resume: bool) -> None:
    """Train on `batch` pictures per process and step; the mean of the weights goes to `out/vae`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float32) if resume else new_vae()
    if not resume:
        torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -5.0)  # start with little noise
    half = Bfloat16Copy(vae.train())
    optimizer = MuonWithAdamW(vae.named_parameters(), lr)
    ema = Ema(vae.parameters(), 0.995)
    torch.manual_seed(1 + rank)
    rng = np.random.default_rng((7, rank, steps))
    probes = probe_pictures()
    started = time.time()
    for step in range(steps):
        pictures = random_batch(rng, batch).to(memory_format=torch.channels_last)
        half.take_weights()
        output, kl = reconstruct(half.modules[0], pictures.bfloat16())
        loss = reconstruction_loss(output.float(), pictures) + KL_WEIGHT * kl.float()
        loss.backward()
        half.give_gradients()
        optimizer.step(learning_rate_fraction(step, steps))
        ema.update(step)
        if rank == 0 and ((step + 1) % 100 == 0 or step + 1 == steps):
            ema.swap()
            row = {"step": step + 1, "loss": loss.item(), "kl": kl.item(), "minutes": (time.time() - started) / 60}
            row |= {name: psnr(vae, pictures) for name, pictures in probes.items()}
            log_row(out, "vae", row)
            vae.save_pretrained(out / "vae")
            ema.swap()


def log_row(out: Path, stage: str, row: dict[str, float]) -> None:
    """Append one line to the stage's log, on the terminal and in `training_<stage>.jsonl` beside the weights."""
    text = json.dumps({key: round(value, 4) for key, value in row.items()})
    print(text, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"training_{stage}.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
