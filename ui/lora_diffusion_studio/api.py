"""The studio's API (`--api`): the endpoints `/generate` and `/adapters` for `gradio_client`.

Gradio shows the functions' parameters and docstrings on the page "Use via API". Parameters have diffusers' names.
"""

# Gradio's events are untyped.
# pyright: standard, reportPrivateImportUsage=false

from typing import Any, get_args

import gradio as gr

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import Mode
from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.backend.generation import GenerationDone
from lora_diffusion_studio.backend.generation import generate as generate_images
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.tabs.handlers import errors_as_messages
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot, normalize_options
from lora_diffusion_studio.view_models.blend_form import DEFAULT_MODE, BlendForm

_DEFAULTS: dict[str, Any] = {name: field.default for name, field in GenerateConfig.model_fields.items()}


def add_api(studio: Studio) -> None:
    """Add the endpoints to the current `gr.Blocks`."""
    _add_generate(studio)
    _add_adapters(studio)


def _add_generate(studio: Studio) -> None:
    def generate(  # noqa: PLR0913, PLR0917 (the endpoint's parameters)
        prompt: str,
        adapters: list[str],
        negative_prompt: str = "",
        base: str = "",
        mode: str = DEFAULT_MODE,
        seed: int = _DEFAULTS["seed"],
        num_inference_steps: int = _DEFAULTS["num_inference_steps"],
        guidance_scale: float = _DEFAULTS["guidance_scale"],
        count: int = _DEFAULTS["count"],
    ) -> dict[str, Any]:
        """Generate images of a blend.

        Args:
            prompt: Prompt.
            adapters: Adapters of the library as `name:weight:options`, such as `neon:0.8:start=0.3`.
            negative_prompt: Negative prompt.
            base: Base model; the studio's default if empty.
            mode: Blend mode: {modes}.
            seed: Seed of the first image. Each further image adds 1.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Guidance scale (CFG).
            count: Number of images.

        Returns:
            The paths of the images under `images`, and notes under `notes`.
        """
        with errors_as_messages(str):
            settings = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "seed": seed,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "count": count,
            }
            form = BlendForm(
                base=base or studio.config.bases[0],
                slots=tuple(parse_adapter_slot(text) for text in adapters),
                mode=mode,
                settings=settings,
            )
            done = [event for event in generate_images(studio, form) if isinstance(event, GenerationDone)][-1]
        return {"images": [str(path) for path in done.paths], "notes": list(done.notes)}

    generate.__doc__ = (generate.__doc__ or "").format(modes=", ".join(get_args(Mode)))
    gr.api(generate, api_name="generate", concurrency_limit=1)


def _add_adapters(studio: Studio) -> None:
    def adapters(base: str = "", search: str = "") -> list[dict[str, Any]]:
        """List the adapters that fit a base model.

        Args:
            base: Base model; the studio's default if empty.
            search: Words that must all occur in the name or the trigger words.

        Returns:
            For each adapter its `name`, `trigger_words` and `preferred_weight`.
        """
        with errors_as_messages(str):
            cards = studio.list_cards(base or studio.config.bases[0], search)
        return [
            {
                "name": card.name,
                "trigger_words": list(card.trigger_words),
                "preferred_weight": card.preferred_weight,
            }
            for card in cards
        ]

    gr.api(adapters, api_name="adapters", queue=False)


def parse_adapter_slot(text: str) -> AdapterSlot:
    """Return the slot of a text such as `neon`, `neon:0.8` or `neon:0.8:start=0.3`.

    Raises:
        ConfigError: If the weight is not a number, or an option is invalid.
    """
    name, _, rest = text.partition(":")
    number, _, options = rest.partition(":")
    if "=" in number:
        number, options = "", rest
    file_name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    try:
        weight = float(number or 1)
    except ValueError:
        raise ConfigError(f"{text}: the weight {number!r} is not a number; write for example {name}:0.8") from None
    return AdapterSlot(name=file_name, weight=weight, options=normalize_options(options))
