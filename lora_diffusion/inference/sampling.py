"""Generate images from a base model and a blend; the commands, previews and studio all sample through this module.

Each image is sampled on its own, with noise drawn on the CPU, so that it depends neither on other images of the same
run nor on the device's random generator.
"""

import io
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast

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
from lora_diffusion.models.load import Base, Pipeline, new_scheduler, quiet_libraries
from lora_diffusion.models.text_encoding import (
    TextContext,
    concatenate_contexts,
    count_chunks,
    encode_prompts,
    negative_context,
)
from lora_diffusion.models.textual_inversion import learned_tokens
from lora_diffusion.prompts.emphasis import parse_emphasis


@dataclass(frozen=True, kw_only=True, repr=False)
class GeneratedImage:
    """A generated image with the recipe that reproduces it. Notebooks show the image."""

    image: Image.Image
    """The picture."""
    recipe: Recipe
    """Base, adapters and settings that it was made with."""

    def __repr__(self) -> str:
        """Describe the image on one line: size, prompt and seed."""
        settings = self.recipe.settings
        size = f"{self.image.width}x{self.image.height}"
        return f"GeneratedImage({size}, {settings.prompt!r}, seed={settings.seed})"

    def _repr_png_(self) -> bytes:
        """Return the PNG that a notebook displays."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG")
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image as a PNG with the recipe in its metadata.

        Raises:
            OutputError: If the file cannot be written.
        """
        write_png(self.image, path, self.recipe)


def single_settings(base: Base, config: GenerateConfig) -> list[GenerateConfig]:
    """Split settings for several images into settings for one image each.

    Args:
        base: Base model, whose default size replaces a missing width or height.
        config: Settings for `count` images.

    Returns:
        Settings with `count` 1 and an explicit size. The seed increases by one from image to image; for variations, it
        is `variation_seed` that increases.

    Raises:
        ConfigError: If a prompt contains a `<lora:...>` tag, or `num_inference_steps`
            exceeds the base's training timesteps.
    """
    tagged = next((text for text in (config.prompt, config.negative_prompt) if "<lora:" in text), "")
    if tagged:
        raise ConfigError(
            f"the prompt {tagged!r} contains a <lora:...> tag, which is not applied here; convert tags to a blend with "
            "`extract_tags` and `resolve_tags`"
        )
    max_steps = int(base.pipe.scheduler.config.num_train_timesteps)
    if config.num_inference_steps > max_steps:
        raise ConfigError(
            f"num_inference_steps is {config.num_inference_steps}, but {base.name} was trained with {max_steps} "
            "timesteps; use at most that many"
        )
    size = {"width": config.width or base.size_px, "height": config.height or base.size_px}
    seed_name = "variation_seed" if config.variation else "seed"
    fields = {**config.model_dump(), **size, "count": 1}
    return [
        validate(GenerateConfig, {**fields, seed_name: fields[seed_name] + i}, source="generate")
        for i in range(config.count)
    ]


def pipeline_with(base: Base, scheduler: Scheduler) -> Pipeline:
    """Create a pipeline from the base's models with a new scheduler, so that runs do not share scheduler state."""
    components = {**base.pipe.components, "scheduler": new_scheduler(base, scheduler)}
    if "safety_checker" in components:
        options: dict[str, Any] = {"requires_safety_checker": False}
    else:
        options = {
            "force_zeros_for_empty_prompt": base.pipe.config["force_zeros_for_empty_prompt"],
            "add_watermarker": False,
        }
    with quiet_libraries():
        pipe: Any = cast(Any, type(base.pipe))(**components, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


OnStep = Callable[[DenoisingStep, Tensor], None]
"""Callback after each denoising step, with the latents (1, c, h, w); an exception that it raises stops sampling."""


def sample(
    base: Base, settings: GenerateConfig, before_step: BeforeStep | None = None, on_step: OnStep | None = None
) -> Image.Image:
    """Sample one image from the base with its current weights; noise is drawn on the CPU.

    Args:
        base: Base model.
        settings: Settings of one image, with an explicit size; see `single_settings`.
        before_step: Hook called before each denoising step; the first call comes before the prompt is encoded.
        on_step: Callback after each denoising step; must not change the latents.

    Raises:
        SamplingError: If the image contains NaN or infinity.
    """
    pipe: Any = cast(Any, pipeline_with(base, settings.scheduler))  # diffusers does not annotate the call
    before_step = before_step or (lambda _, __: None)

    def encode() -> Tensor:
        return concatenate_contexts(encode_contexts(base, settings)).hidden

    before_step(DenoisingStep(index=0, total=settings.num_inference_steps), encode)
    arguments = prompt_arguments(encode_contexts(base, settings))

    def after_step(_pipe: Any, call: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        # some schedulers, such as PNDM, call the UNet more often than `num_inference_steps`
        calls = len(pipe.scheduler.timesteps)
        if on_step:
            on_step(
                DenoisingStep(index=call * settings.num_inference_steps // calls, total=settings.num_inference_steps),
                tensors["latents"],
            )
        if call + 1 < calls:
            before_step(
                DenoisingStep(
                    index=(call + 1) * settings.num_inference_steps // calls, total=settings.num_inference_steps
                ),
                encode,
            )
        return {}

    with _preserve_vae_dtype(pipe.vae):
        result = pipe(
            **arguments,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            width=settings.width,
            height=settings.height,
            **_noise_arguments(base, settings, arguments["prompt_embeds"].dtype),
            output_type="np",
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents"],
        )
    if not np.isfinite(result.images).all():
        raise SamplingError(
            f"the image of seed {settings.seed} contains NaN; use lower adapter weights or a precision with a wider "
            "range, such as float32"
        )
    return pipe.numpy_to_pil(result.images)[0]


def _noise_arguments(base: Base, settings: GenerateConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the pipeline arguments for noise: the generator, and for a variation also the initial latents."""
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    if not settings.variation:
        return {"generator": generator}
    shape = (1, base.pipe.unet.config.in_channels, *_latent_size(base, settings))
    noise = variation_noise(shape, generator, settings.variation_seed, settings.variation, dtype)
    return {"generator": generator, "latents": noise}


@torch.no_grad()
def decode_preview(base: Base, latents: Tensor, max_side: int = 32) -> Image.Image:
    """Decode a small preview of latents.

    Args:
        base: Base model, whose autoencoder decodes.
        latents: Latents (1, c, h, w).
        max_side: Larger latents are downscaled to this height or width before decoding.
    """
    scale = min(1.0, max_side / max(latents.shape[2:]))
    small = functional.interpolate(latents.float(), scale_factor=scale, mode="area") if scale < 1 else latents
    vae: Any = cast(Any, base.vae)
    decoded: Tensor = vae.decode(small.to(vae.dtype) / vae.config.scaling_factor).sample
    pixels = ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).nan_to_num().round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def encode_contexts(base: Base, settings: GenerateConfig) -> list[TextContext]:
    """Encode the prompts of one image to the same number of tokens.

    Returns:
        The negative context (only with classifier-free guidance), then the prompt's.
    """
    guided = settings.guidance_scale > 1 and base.pipe.unet.config.time_cond_proj_dim is None
    texts = [settings.negative_prompt] * guided + [settings.prompt]
    chunks = count_chunks(base, [parse_emphasis(text) for text in texts])
    prompt = encode_prompts(base, [settings.prompt], size_px=base.size_px, chunks=chunks)
    if not guided:
        return [prompt]
    return [negative_context(base, settings.negative_prompt, size_px=base.size_px, chunks=chunks), prompt]


def prompt_arguments(contexts: Sequence[TextContext]) -> dict[str, Tensor]:
    """Convert contexts, in the order of `encode_contexts`, to the pipeline arguments for prompt embeddings."""
    arguments: dict[str, Tensor] = {}
    for prefix, context in zip(("", "negative_"), reversed(contexts), strict=False):
        arguments[f"{prefix}prompt_embeds"] = context.hidden
        if context.added is not None:
            arguments[f"{prefix}pooled_prompt_embeds"] = context.added["text_embeds"]
    return arguments


@contextmanager
def _preserve_vae_dtype(vae: Any) -> Generator[None]:
    """Restore the autoencoder's dtype on exit: diffusers upcasts SDXL's to decode and does not undo it after Ctrl-C."""
    dtype = vae.dtype
    try:
        yield
    finally:
        with quiet_libraries():  # diffusers warns about the cast for each image
            vae.to(dtype)


def generate(
    base: Base,
    configs: Sequence[GenerateConfig],
    blend: Blend | None = None,
    *,
    composition: Composition | None = None,
    backup: Backup = "memory",
    on_image: Callable[[GeneratedImage], None] | None = None,
    on_step: OnStep | None = None,
) -> list[GeneratedImage]:
    """Generate images with a blend, one after another; the base is restored afterwards.

    Args:
        base: Base model.
        configs: Settings of the images.
        blend: Adapters to apply; the base alone if omitted.
        composition: How the adapters are combined; as a sum if omitted.
        backup: Where the original values of changed parameters come from; see `weight_patch`.
        on_image: Callback with each image as soon as it is finished.
        on_step: Callback after each denoising step.

    Returns:
        All images, each with its recipe.

    Raises:
        FamilyMismatchError: If an adapter does not fit the base.
        AdapterFormatError: If an adapter contains NaN or infinity.
        ConfigError: If the settings, the composition and the blend do not fit each other or the base.
        SamplingError: If an image contains NaN or infinity.
    """
    blend, composition = blend or Blend(), composition or Composition()
    images: list[GeneratedImage] = []
    singles = [single for config in configs for single in single_settings(base, config)]
    for size, group in groupby(singles, key=partial(_latent_size, base)):
        with (
            composition_context(base, blend, composition, size, backup=backup) as before_step,
            learned_tokens(base, blend) as rewrite,
        ):
            for settings in group:
                recipe = _make_recipe(base, blend, composition, settings)
                image = sample(base, rewrite_prompts(settings, rewrite), before_step, on_step)
                images.append(GeneratedImage(image=image, recipe=recipe))
                if on_image:
                    on_image(images[-1])
    return images


def rewrite_prompts(settings: GenerateConfig, rewrite: Callable[[str], str]) -> GenerateConfig:
    """Return the settings with a function applied to the prompt and the negative prompt."""
    prompts = {"prompt": rewrite(settings.prompt), "negative_prompt": rewrite(settings.negative_prompt)}
    return settings.model_copy(update=prompts)


def _latent_size(base: Base, settings: GenerateConfig) -> tuple[int, int]:
    """Return the height and width of the latents of an image."""
    factor = int(base.pipe.vae_scale_factor)
    return (settings.height or base.size_px) // factor, (settings.width or base.size_px) // factor


def _make_recipe(base: Base, blend: Blend, composition: Composition, settings: GenerateConfig) -> Recipe:
    """Record what is needed to reproduce an image."""
    return Recipe(
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
