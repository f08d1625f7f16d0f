"""The one way to make an image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lora_diffusion.adapters.blend import Blend
from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.config.generate import GenerateConfig, Scheduler
from lora_diffusion.config.preset import Composition
from lora_diffusion.config.settings import validate
from lora_diffusion.core.dtypes import dtype_name
from lora_diffusion.errors import ConfigError, SamplingError
from lora_diffusion.inference.composition import BeforeStep, composition_context
from lora_diffusion.inference.in_place import Backup
from lora_diffusion.inference.initial_noise import variation_noise
from lora_diffusion.library.recipe import Recipe, blend_entries, library_versions, write_png
from lora_diffusion.models.load import Base, new_scheduler, quiet_libraries
from lora_diffusion.models.text_encoding import (
    TextContext,
    concatenate_contexts,
    count_chunks,
    encode_prompts,
    negative_context,
)
from lora_diffusion.models.textual_inversion import learned_tokens
from lora_diffusion.prompts.emphasis import parse_emphasis


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """An image and the recipe that makes it again."""

    image: Image.Image
    recipe: Recipe

    def save(self, path: Path) -> None:
        """Write a PNG that carries the recipe. Raises OutputError."""
        write_png(self.image, path, self.recipe)


def single_settings(base: Base, config: GenerateConfig) -> list[GenerateConfig]:
    """The settings of each picture alone: its own seed, the size spelled out. Raises ConfigError."""
    tagged = next((text for text in (config.prompt, config.negative_prompt) if "<lora:" in text), "")
    if tagged:
        raise ConfigError(
            f"the prompt {tagged!r} has a tag in it; `extract_tags` and `resolve_tags` turn it into a blend"
        )
    most = int(base.pipe.scheduler.config.num_train_timesteps)
    if config.steps > most:
        raise ConfigError(f"'steps' is {config.steps}; {base.name} was trained with {most} timesteps, use fewer")
    size = {"width": config.width or base.size_px, "height": config.height or base.size_px}
    counted = "variation_seed" if config.variation else "seed"
    table = {**config.model_dump(), **size, "count": 1}
    return [
        validate(GenerateConfig, {**table, counted: table[counted] + i}, source="generate") for i in range(config.count)
    ]


def pipeline_with(base: Base, scheduler: Scheduler) -> Any:
    """The base's models in a pipeline with a scheduler of its own, so that no state is shared between two runs."""
    components = {**base.pipe.components, "scheduler": new_scheduler(base, scheduler)}
    if "safety_checker" in components:
        options: dict[str, Any] = {"requires_safety_checker": False}
    else:
        zeros = base.pipe.config.force_zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    with quiet_libraries():
        pipe = type(base.pipe)(**components, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


OnStep = Callable[[DenoisingStep, Tensor], None]
"""Told of each denoising step that was taken, with the latents (1, c, h, w) after it; what it raises ends sampling."""


def sample(
    base: Base, settings: GenerateConfig, before_step: BeforeStep | None = None, on_step: OnStep | None = None
) -> Image.Image:
    """One picture from the base as it stands. Noise comes from the CPU, so that devices agree on it.

    `before_step` is called with each denoising step before it is taken; the first comes before the prompt is read.
    `on_step` changes nothing. Raises SamplingError if the result holds NaN.
    """
    pipe = pipeline_with(base, settings.scheduler)
    before_step = before_step or (lambda _, __: None)

    def encode() -> Tensor:
        return concatenate_contexts(encode_contexts(base, settings)).hidden

    before_step(DenoisingStep(index=0, total=settings.steps), encode)
    arguments = prompt_arguments(encode_contexts(base, settings))

    def after_step(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        calls = len(pipe.scheduler.timesteps)  # some schedulers take more than one to a step
        if on_step:
            on_step(DenoisingStep(index=step * settings.steps // calls, total=settings.steps), tensors["latents"])
        if step + 1 < calls:
            before_step(DenoisingStep(index=(step + 1) * settings.steps // calls, total=settings.steps), encode)
        return {}

    with kept_vae_dtype(pipe.vae):
        result = pipe(
            **arguments,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            **noise_arguments(base, settings, arguments["prompt_embeds"].dtype),
            output_type="np",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents"],
        )
    if not np.isfinite(result.images).all():
        raise SamplingError(
            f"the picture of seed {settings.seed} came out as NaN; lower the adapters' weights, or use a precision of "
            "wider range"
        )
    return pipe.numpy_to_pil(result.images)[0]


def noise_arguments(base: Base, settings: GenerateConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The source of all noise as a pipeline takes it; of a variation also the noise that it starts from."""
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    if not settings.variation:
        return {"generator": generator}
    shape = (1, base.pipe.unet.config.in_channels, *latent_size(base, settings))
    noise = variation_noise(shape, generator, settings.variation_seed, settings.variation, dtype)
    return {"generator": generator, "latents": noise}


@torch.no_grad()
def decode_preview(base: Base, latents: Tensor, most: int = 32) -> Image.Image:
    """What latents (1, c, h, w) look like, quickly: shrunk to at most `most` on a side before they are decoded."""
    share = min(1.0, most / max(latents.shape[2:]))
    small = functional.interpolate(latents.float(), scale_factor=share, mode="area") if share < 1 else latents
    vae = base.pipe.vae
    decoded = vae.decode(small.to(vae.dtype) / vae.config.scaling_factor).sample
    pixels = ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).nan_to_num().round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def encode_contexts(base: Base, settings: GenerateConfig) -> list[TextContext]:
    """What the UNet is told, equally long: the negative prompt comes first if there is guidance, then the prompt."""
    guided = settings.guidance > 1 and base.pipe.unet.config.time_cond_proj_dim is None
    texts = [settings.negative_prompt] * guided + [settings.prompt]
    chunks = count_chunks(base, [parse_emphasis(text) for text in texts])
    prompt = encode_prompts(base, [settings.prompt], size_px=base.size_px, chunks=chunks)
    if not guided:
        return [prompt]
    return [negative_context(base, settings.negative_prompt, size_px=base.size_px, chunks=chunks), prompt]


def prompt_arguments(contexts: Sequence[TextContext]) -> dict[str, Tensor]:
    """The contexts as a pipeline takes them."""
    arguments: dict[str, Tensor] = {}
    for prefix, context in zip(("", "negative_"), reversed(contexts), strict=False):
        arguments[f"{prefix}prompt_embeds"] = context.hidden
        if context.added is not None:
            arguments[f"{prefix}pooled_prompt_embeds"] = context.added["text_embeds"]
    return arguments


@contextmanager
def kept_vae_dtype(vae: Any) -> Iterator[None]:
    """Give the autoencoder its type back: diffusers widens SDXL's to decode, and leaves it so after a Ctrl-C."""
    dtype = vae.dtype
    try:
        yield
    finally:
        with quiet_libraries():  # diffusers would warn of it at each picture
            vae.to(dtype)


def generate(
    base: Base,
    configs: Sequence[GenerateConfig],
    blend: Blend | None = None,
    *,
    composition: Composition | None = None,
    backup: Backup = "memory",
    on_picture: Callable[[GeneratedImage], None] | None = None,
    on_step: OnStep | None = None,
) -> list[GeneratedImage]:
    """Pictures of all settings under one blend, each with its recipe.

    They are made one after another, so that none depends on its neighbors; `composition` says how the adapters come
    together, by default as a sum; `backup` where the base's own values are kept meanwhile; `on_picture` gets each
    picture as soon as it is there, and `on_step` each denoising step. Raises FamilyMismatchError if an adapter does not
    belong to the base, AdapterFormatError for NaN, ConfigError, SamplingError.
    """
    blend, composition = blend or Blend(), composition or Composition()
    pictures: list[GeneratedImage] = []
    singles = [single for config in configs for single in single_settings(base, config)]
    for size, group in groupby(singles, key=partial(latent_size, base)):
        with (
            composition_context(base, blend, composition, size, backup=backup) as before_step,
            learned_tokens(base, blend) as rewrite,
        ):
            for settings in group:
                recipe = make_recipe(base, blend, composition, settings)
                pictures.append(
                    GeneratedImage(
                        image=sample(base, rewrite_prompts(settings, rewrite), before_step, on_step), recipe=recipe
                    )
                )
                if on_picture:
                    on_picture(pictures[-1])
    return pictures


def rewrite_prompts(settings: GenerateConfig, rewrite: Callable[[str], str]) -> GenerateConfig:
    """The settings with both prompts rewritten."""
    texts = {"prompt": rewrite(settings.prompt), "negative_prompt": rewrite(settings.negative_prompt)}
    return settings.model_copy(update=texts)


def latent_size(base: Base, settings: GenerateConfig) -> tuple[int, int]:
    """Height and width of the latents of a picture."""
    factor = int(base.pipe.vae_scale_factor)
    return (settings.height or base.size_px) // factor, (settings.width or base.size_px) // factor


def make_recipe(base: Base, blend: Blend, composition: Composition, settings: GenerateConfig) -> Recipe:
    """What it takes to make a picture again."""
    return Recipe(
        kind="image",
        base=base.name,
        base_hash=base.hash,
        adapters=blend_entries(blend),
        composition=composition,
        settings=settings,
        precision=dtype_name(base.pipe.unet.dtype),
        quantization=base.quantization,
        device=base.pipe.device.type,
        versions=library_versions(),
    )
