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

from train_scripts.tiny_world.architecture import new_vae
from train_scripts.tiny_world.optimiser import Ema, MatrixOptimiser, learning_rate_fraction
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import compose, random_scene
from train_scripts.tiny_world.vae_pictures import scribble, to_tensor, vae_batch


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Root mean square per picture (what PSNR measures), L1 of values, edges and of colour at a coarse scale.

    The coarse term keeps hues: without it a small autoencoder gives up magenta against green.
    """
    error = output - target
    rms = (error.square().mean(dim=(1, 2, 3)) + 1e-5).sqrt().mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = functional.avg_pool2d(error, 4).abs().mean()
    return rms + 0.5 * error.abs().mean() + 0.25 * edges + 0.5 * coarse


def autoencode(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions and the mean KL term per latent element, through a sampled latent."""
    posterior = vae.encode(pictures).latent_dist
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return vae.decode(posterior.sample()).sample, kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB over (n, 3, h, w) pictures in -1..1."""
    output = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((output - pictures) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def train_vae(out: Path, *, steps: int, batch: int, lr: float, resume: bool) -> None:
    """Train on `batch` pictures per process and step; the mean of the weights goes to `out/vae`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32) if resume else new_vae()
    if not resume:
        torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -5.0)  # start with little noise
    optimiser = MatrixOptimiser(vae.named_parameters(), lr)
    ema = Ema(vae.parameters(), 0.995)
    torch.manual_seed(1 + rank)
    rng = np.random.default_rng((7, rank, steps))
    probe_rng = np.random.default_rng(99)
    probe = torch.stack([to_tensor(flat(compose(random_scene(probe_rng, held_out=True)))) for _ in range(24)])
    lines = torch.stack([to_tensor(scribble(probe_rng)) for _ in range(16)])
    started = time.time()
    for step in range(steps):
        pictures = vae_batch(rng, batch).to(memory_format=torch.channels_last)
        output, kl = autoencode(vae, pictures)
        loss = reconstruction_loss(output, pictures) + 5e-4 * kl
        loss.backward()
        optimiser.step(learning_rate_fraction(step, steps))
        ema.update(step)
        if rank == 0 and ((step + 1) % 100 == 0 or step + 1 == steps):
            ema.swap()
            row = {"step": step + 1, "loss": loss.item(), "kl": kl.item(), "minutes": (time.time() - started) / 60}
            row |= {"flat_db": psnr(vae, probe), "lines_db": psnr(vae, lines)}
            log_row(out, "vae", row)
            vae.save_pretrained(out / "vae")
            ema.swap()


def log_row(out: Path, stage: str, row: dict[str, float]) -> None:
    """One line of the stage's log, to the terminal and to `training_<stage>.jsonl` beside the weights."""
    line = json.dumps({key: round(value, 4) for key, value in row.items()})
    print(line, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"training_{stage}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
