"""A generated image in a notebook and at a prompt."""

import io

from PIL import Image

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.inference.sampling import GeneratedImage
from lora_diffusion.library.recipe import Recipe


def generated(settings: GenerateConfig) -> GeneratedImage:
    return GeneratedImage(image=Image.new("RGB", (64, 32), "red"), recipe=Recipe.model_construct(settings=settings))


def test_a_notebook_shows_the_image() -> None:
    with Image.open(io.BytesIO(generated(GenerateConfig(prompt=""))._repr_png_())) as shown:
        assert (shown.format, shown.size, shown.getpixel((0, 0))) == ("PNG", (64, 32), (255, 0, 0))


def test_it_prints_size_prompt_and_seed() -> None:
    assert repr(generated(GenerateConfig(prompt="a fox", seed=7))) == "GeneratedImage(64x32, 'a fox', seed=7)"
