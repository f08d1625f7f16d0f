"""Contact sheets of generated pictures, to be looked at while the base trains."""

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

PROBE_PROMPTS = (
    "a red cat on a meadow",
    "a blue dog on a beach at sunset",
    "a white rabbit on the left in the forest at night",
    "a flying yellow bird in the snow",
    "a purple robot in the city in the rain",
    "a big green house in the mountains in autumn",
    "an orange car in a desert",
    "a pink boat at the sea",
    "a black rocket on the moon",
    "a small red balloon on the right in the city",
    "a blue mushroom in the woods in autumn",
    "a yellow flower in a room",
    "a red cat and a blue robot on a meadow",
    "a brown bear next to a pink penguin in the snow",
    "a green frog in front of a white castle at night",
    "an orange fox to the left of a purple turtle in the desert",
    "a walking elephant on a farm in spring",
    "an owl in the room with a gift",
    "a pencil sketch of a cat in the city",
    "a neon sign of a blue car on a beach",
    "a comic of a red dog in the forest",
    "a mosaic of a yellow boat at the sea",
    "a chalk drawing of a penguin in the mountains",
    "a crayon drawing of a house on a farm",
)


def sample_sheet(
    pipe: StableDiffusionPipeline, prompts: tuple[str, ...], *, columns: int = 6, steps: int = 20, guidance: float = 4.0
) -> Image.Image:
    """One picture for each prompt, with seeds counted from 0."""
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 8):
        chunk = list(prompts[start : start + 8])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        pictures += pipe(chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    return sheet
