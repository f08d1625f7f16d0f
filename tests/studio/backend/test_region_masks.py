"""Region masks."""

from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.errors import ConfigError
from lora_diffusion_studio.backend.generation import GenerationDone, generate
from lora_diffusion_studio.backend.region_masks import save_mask, set_region
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm

PROMPT = {"prompt": "a gloop character in the snow, in zwx style", "num_inference_steps": 4, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))


def test_painted_mask_limits_the_adapter(studio: Studio) -> None:
    canvas = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    with pytest.raises(ConfigError, match="the mask is empty"):
        save_mask(studio, canvas)
    canvas.paste((124, 58, 237, 255), (0, 0, 32, 64))
    mask = save_mask(studio, canvas)
    assert save_mask(studio, canvas) == mask
    slots = set_region(BOTH, "neon.safetensors", mask)
    form = BlendForm(slots=tuple(slots), settings=PROMPT)
    region = studio.make_request(form).entries[0].region
    assert region
    assert Path(region.mask) == mask.resolve()
    assert isinstance(list(generate(studio, form))[-1], GenerationDone)
    assert set_region(slots, "neon.safetensors", None) == list(BOTH)
    with pytest.raises(ConfigError, match="choose an adapter of the blend"):
        set_region(BOTH, "ink.safetensors", mask)
