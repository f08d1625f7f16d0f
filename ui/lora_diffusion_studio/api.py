"""The studio for programs: named endpoints with typed arguments, there only if asked for (`--api`)."""

from typing import Any

import gradio as gr

from lora_diffusion.config.generate import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.forms import BlendForm
from lora_diffusion_studio.rows import AdapterSlot, normalize_options
from lora_diffusion_studio.studio import Finished, Studio
from lora_diffusion_studio.tabs.events import errors_as_messages


def add_api(studio: Studio) -> None:
    """Endpoints `/generate` and `/adapters`; inside the app's blocks."""

    def generate(  # noqa: PLR0913, PLR0917 (what a program may say)
        prompt: str,
        adapters: list[str],
        negative_prompt: str = "",
        base: str = "",
        mode: str = "sum",
        seed: int = 0,
        steps: int = DEFAULT_NUM_INFERENCE_STEPS,
        guidance: float = DEFAULT_GUIDANCE_SCALE,
        count: int = 1,
    ) -> dict[str, Any]:
        """Pictures of a blend; adapters as `name:0.8:start=0.3`. Returns the files' paths, and notes."""
        with errors_as_messages(str):
            settings = {
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "seed": seed,
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "count": count,
            }
            form = BlendForm(
                base=base or studio.places.bases[0],
                rows=tuple(parse_row(text) for text in adapters),
                mode=mode,
                settings=settings,
            )
            done = [event for event in studio.render(form) if isinstance(event, Finished)][-1]
        return {"pictures": [str(path) for path in done.paths], "notes": list(done.notes)}

    def adapters(base: str = "", search: str = "") -> list[dict[str, Any]]:
        """The adapters that fit a base: name, triggers, preferred weight."""
        with errors_as_messages(str):
            cards = studio.cards(base or studio.places.bases[0], search)
        return [{"name": card.name, "triggers": list(card.triggers), "weight": card.preferred} for card in cards]

    gr.api(generate, api_name="generate", concurrency_limit=1)
    gr.api(adapters, api_name="adapters", queue=False)


def parse_row(text: str) -> AdapterSlot:
    """`neon:0.8:start=0.3`. Raises ConfigError."""
    name, _, rest = text.partition(":")
    number, _, options = rest.partition(":")
    if "=" in number:
        number, options = "", rest
    known = name if name.endswith(".safetensors") else f"{name}.safetensors"
    try:
        weight = float(number or 1)
    except ValueError:
        raise ConfigError(f"{text}: {number!r} is no weight; write name:0.8") from None
    return AdapterSlot(name=known, weight=weight, options=normalize_options(options))
