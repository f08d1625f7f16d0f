"""Stage two of the embedded base: the UNet and the text encoder together, on cached latents."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from train_scripts.tiny_world.architecture import new_scheduler, new_text_encoder, new_tokenizer, new_unet
from train_scripts.tiny_world.captions import caption, vocabulary
from train_scripts.tiny_world.optimiser import Ema, MatrixOptimiser, learning_rate_fraction
from train_scripts.tiny_world.render import flat
from train_scripts.tiny_world.scene import Scene, compose, random_scene
from train_scripts.tiny_world.vae_pictures import to_tensor
from train_scripts.tiny_world.vae_training import log_row

PROBE_PROMPTS = (
    "a red cat on a meadow",
    "a blue dog on a beach at sunset",
    "a white rabbit in the forest at night",
    "a yellow bird in the snow",
    "a purple robot in the city in the rain",
    "a green house in the mountains",
    "an orange car in a desert",
    "a pink boat at the sea",
    "a black rocket in the mountains at night",
    "a red balloon in the city, by day",
    "a blue mushroom in the woods",
    "a yellow flower in the grass at dusk",
)


@torch.no_grad()
def cache_latents(vae_folder: Path, target: Path, *, count: int, seed: int) -> None:
    """Draw `count` training scenes and keep their latents in float16, with the scenes beside them.

    Latents are the posterior's mean, scaled to unit standard deviation; that factor is written into the
    autoencoder's own config.
    """
    vae = AutoencoderKL.from_pretrained(vae_folder).to(memory_format=torch.channels_last)
    rng = np.random.default_rng((3, seed))
    scenes = [random_scene(rng, held_out=False) for _ in range(count)]
    parts: list[Tensor] = []
    for start in range(0, count, 64):
        pictures = torch.stack([to_tensor(flat(compose(s))) for s in scenes[start : start + 64]])
        parts.append(vae.encode(pictures).latent_dist.mean)
    latents = torch.cat(parts)
    torch.save({"latents": latents.half(), "scenes": scenes}, target)
    print(f"{target}: {count} latents, standard deviation {latents.std():.3f}", flush=True)


def load_latents(folder: Path) -> tuple[Tensor, list[Scene]]:
    files = sorted(folder.glob("latents*.pt"))
    loaded: list[dict[str, Any]] = [torch.load(f, weights_only=False) for f in files]
    return torch.cat([f["latents"] for f in loaded]), [s for f in loaded for s in f["scenes"]]


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


def denoising_loss(pipe: StableDiffusionPipeline, latents: Tensor, prompts: list[str], alphas: Tensor) -> Tensor:
    """Mean squared error of the v-prediction."""
    count, num_steps = len(latents), len(alphas)
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    t = spread_timesteps(count, num_steps)
    signal, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = (signal * latents + sigma * noise).to(memory_format=torch.channels_last)
    context = pipe.text_encoder(ids).last_hidden_state
    return (pipe.unet(noisy, t, context).sample - (signal * noise - sigma * latents)).square().mean()


def spread_timesteps(count: int, num_steps: int) -> Tensor:
    """(count,) timesteps, spread evenly over the batch: four of five logit-normal [arXiv:2403.03206], one uniform.

    The middle is where shapes form; the ends, which fix brightness and grain, need few samples.
    """
    even = (torch.randperm(count) + torch.rand(count)) / count
    share = torch.special.ndtri(even).sigmoid()
    share[::5] = torch.rand(len(share[::5]))
    return (share * num_steps).long().clamp(0, num_steps - 1)


def contact_sheet(pipe: StableDiffusionPipeline, prompts: tuple[str, ...]) -> Image.Image:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = pipe(list(prompts), num_inference_steps=20, guidance_scale=4.0, generator=generators).images
    columns, side = 6, 192
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (i % columns * side, i // columns * side))
    return sheet


def train_unet(out: Path, *, steps: int, batch: int, lr: float, resume: bool) -> None:
    """Train on `batch` latents per process and step; the mean of the weights goes to `out`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    latents, scenes = load_latents(out.parent)
    scale = 1 / float(latents.float().std())
    if rank == 0 and not resume:
        new_pipeline(out, scale).save_pretrained(out)
    if dist.is_initialized():
        dist.barrier()
    pipe = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32, safety_checker=None)
    scale = pipe.vae.config.scaling_factor
    parts = [(f"{n}.{k}", p) for n in ("unet", "text_encoder") for k, p in getattr(pipe, n).named_parameters()]
    optimiser, ema = MatrixOptimiser(parts, lr), Ema([p for _, p in parts], 0.998)
    alphas = pipe.scheduler.alphas_cumprod
    pipe.unet.train()
    pipe.text_encoder.train()
    torch.manual_seed(1 + rank + steps)
    rng = np.random.default_rng((11, rank, steps))
    started, losses = time.time(), []
    for step in range(steps):
        chosen = rng.integers(0, len(scenes), batch)
        prompts = ["" if rng.random() < 0.1 else caption(scenes[i], rng) for i in chosen]
        loss = denoising_loss(pipe, latents[chosen].float() * scale, prompts, alphas)
        loss.backward()
        optimiser.step(learning_rate_fraction(step, steps))
        ema.update(step)
        losses.append(loss.item())
        if rank == 0 and (step + 1) % 25 == 0:
            recent = sum(losses[-25:]) / 25
            log_row(out, "unet", {"step": step + 1, "loss": recent, "minutes": (time.time() - started) / 60})
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            ema.swap()
            pipe.save_pretrained(out)
            contact_sheet(pipe, PROBE_PROMPTS).save(out.parent / f"sheet_{step + 1:05d}.png")
            ema.swap()


def export(out: Path, target: Path) -> None:
    """Save the pipeline in `out` to `target` in float16, with the logs of its training.

    The text encoder's configuration says float32, because transformers would otherwise load it in the type of its
    file, and diffusers loads the rest in float32.
    """
    pipe = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float16, safety_checker=None)
    pipe.save_pretrained(target)
    config = target / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for file in target.rglob("*.json"):  # diffusers writes down where the weights were loaded from
        if file.name in ("config.json", "model_index.json"):
            table = json.loads(file.read_text())
            table.pop("_name_or_path", None)
            file.write_text(json.dumps(table, indent=2) + "\n")
    for log in sorted(out.glob("training_*.jsonl")):
        shutil.copyfile(log, target / log.name)
