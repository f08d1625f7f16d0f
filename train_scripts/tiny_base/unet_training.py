"""Stage three of the embedded base: UNet and text encoder together, as a long job that can stop at any time.

The whole state (weights, their running mean, both optimizers, the step) is saved every few minutes and continued from.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from train_scripts.picture_world.captions import vocabulary, write_caption
from train_scripts.tiny_base.architecture import new_scheduler, new_text_encoder, new_tokenizer, new_unet
from train_scripts.tiny_base.latents import StyledScene, load_latents
from train_scripts.tiny_base.optimizer import Bfloat16Copy, Ema, MuonWithAdamW, learning_rate_fraction
from train_scripts.tiny_base.sheet import PROBE_PROMPTS, sample_sheet
from train_scripts.tiny_base.vae_training import log_row

CAPTION_DROPOUT = 0.1
SAVE_EVERY_S = 300
SHEET_EVERY = 1000
LOG_EVERY = 50


@dataclass
class UnetRun:
    """The state of stage three."""

    pipe: StableDiffusionPipeline
    half: Bfloat16Copy
    """UNet and text encoder in bfloat16, which compute."""
    optimizer: MuonWithAdamW
    ema: Ema
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Write the state beside `file`, sync it, and rename it."""
        state = {
            "step": self.step,
            "unet": self.pipe.unet.state_dict(),
            "text_encoder": self.pipe.text_encoder.state_dict(),
            "ema": self.ema.mean,
            "momenta": self.optimizer.momenta,
            "adam": self.optimizer.adam.state_dict(),
        }
        part = file.with_suffix(".part")
        with part.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)

    def load(self, file: Path) -> None:
        state = torch.load(file)
        self.step = state["step"]
        self.pipe.unet.load_state_dict(state["unet"])
        self.pipe.text_encoder.load_state_dict(state["text_encoder"])
        self.ema.mean = state["ema"]
        self.optimizer.momenta = state["momenta"]
        self.optimizer.adam.load_state_dict(state["adam"])

    def save_pipeline(self, folder: Path) -> None:
        """Save the running mean of the weights as a diffusers folder."""
        self.ema.swap()
        self.pipe.save_pretrained(folder)
        self.ema.swap()


def new_pipeline(out: Path, scaling_factor: float) -> StableDiffusionPipeline:
    """A fresh UNet and text encoder around the trained autoencoder."""
    vae = AutoencoderKL.from_pretrained(out / "vae")
    vae.register_to_config(scaling_factor=round(scaling_factor, 5))
    tokenizer = new_tokenizer(vocabulary(), out / "tokenizer")
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=new_unet(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def begin_run(out: Path, lr: float, scaling_factor: float) -> UnetRun:
    """The saved state in `out`, or the pipeline in `out` with fresh optimizers, or a fresh model."""
    torch.manual_seed(0)
    if (out / "unet").is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32, safety_checker=None)
    else:
        pipe = new_pipeline(out, scaling_factor)
    half = Bfloat16Copy(pipe.unet.train(), pipe.text_encoder.train())
    named = [(f"{n}.{k}", p) for n in ("unet", "text_encoder") for k, p in getattr(pipe, n).named_parameters()]
    run = UnetRun(pipe=pipe, half=half, optimizer=MuonWithAdamW(named, lr), ema=Ema([p for _, p in named], 0.9995))
    if (out / "state.pt").is_file():
        run.load(out / "state.pt")
        print(f"continuing from step {run.step}", flush=True)
    return run


def spread_timesteps(count: int, num_steps: int) -> Tensor:
    """(count,) timesteps, spread evenly over the batch: four of five logit-normal [arXiv:2403.03206], one uniform.

    The middle is where shapes form; the ends, which fix brightness and grain, need few samples.
    """
    even = (torch.randperm(count) + torch.rand(count)) / count
    share = torch.special.ndtri(even).sigmoid()
    share[::5] = torch.rand(len(share[::5]))
    return (share * num_steps).long().clamp(0, num_steps - 1)


def denoising_loss(run: UnetRun, latents: Tensor, prompts: list[str], alphas: Tensor) -> Tensor:
    """Mean squared error of the v-prediction [arXiv:2202.00512]."""
    unet, text_encoder = run.half.modules
    ids = run.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    t = spread_timesteps(len(latents), len(alphas))
    signal, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = (signal * latents + sigma * noise).to(torch.bfloat16, memory_format=torch.channels_last)
    prediction = unet(noisy, t, text_encoder(ids).last_hidden_state).sample
    return (prediction.float() - (signal * noise - sigma * latents)).square().mean()


def draw_batch(latents: Tensor, scenes: list[StyledScene], batch: int, step: int) -> tuple[Tensor, list[str]]:
    """Latents and captions of one step; the same step always draws the same."""
    rng = np.random.default_rng((11, step))
    chosen = rng.integers(0, len(scenes), batch)
    prompts = []
    for i in chosen:
        scene, style = scenes[i]
        prompts.append("" if rng.random() < CAPTION_DROPOUT else write_caption(scene, rng, style=style))
    return latents[chosen].float(), prompts


def train_unet(out: Path, *, samples: int, batch: int, lr: float, planned_samples: int | None = None) -> None:
    """Train until `samples` latents have been seen, in steps of `batch`, continuing what `out` holds.

    Args:
        out: Folder with the autoencoder; receives the pipeline, the state and the log. Latents lie beside it.
        samples: Latents to see in all, over all runs.
        batch: Latents per step.
        lr: Peak learning rate.
        planned_samples: Length of the learning rate's schedule, if this run stops before its end.
    """
    latents, scenes = load_latents(out.parent)
    run = begin_run(out, lr, scaling_factor=1 / float(latents[:20000].float().std()))
    scale, alphas = run.pipe.vae.config.scaling_factor, run.pipe.scheduler.alphas_cumprod
    steps, planned_steps = samples // batch, (planned_samples or samples) // batch
    saved = logged = time.time()
    while run.step < steps:
        torch.manual_seed(run.step)
        drawn, prompts = draw_batch(latents, scenes, batch, run.step)
        run.half.take_weights()
        loss = denoising_loss(run, drawn * scale, prompts, alphas)
        loss.backward()
        run.half.give_gradients()
        run.optimizer.step(learning_rate_fraction(run.step, planned_steps, warmup=200, hold=0.6))
        run.ema.update(run.step)
        run.step += 1
        run.losses.append(loss.item())
        if run.step % LOG_EVERY == 0:
            minutes = (time.time() - logged) / 60
            mean = sum(run.losses[-LOG_EVERY:]) / LOG_EVERY
            log_row(out, "unet", {"step": run.step, "samples": run.step * batch, "loss": mean, "minutes": minutes})
            logged, run.losses = time.time(), []
        if run.step % SHEET_EVERY == 0 or run.step == steps:
            run.save_pipeline(out)
        if run.step % SHEET_EVERY == 0:
            run.ema.swap()
            sample_sheet(run.pipe, PROBE_PROMPTS).save(out.parent / f"sheet_{run.step:06d}.png")
            run.ema.swap()
        if time.time() - saved > SAVE_EVERY_S or run.step == steps:
            run.save(out / "state.pt")
            saved = time.time()
