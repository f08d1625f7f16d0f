"""The form of the Blend tab: requests and seeds."""

from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm, form_from_request, make_request, with_next_seed

PROMPT = {"prompt": "a gloop character in the snow, in zwx style", "num_inference_steps": 4, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))


def test_form_and_request_round_trip(studio: Studio) -> None:
    form = BlendForm(slots=BOTH, mode="switch", settings=PROMPT, composition={"switch_every": 3})
    again, notes = form_from_request(make_request(form, studio.open_library()), studio.open_library())
    assert notes == ()
    assert again == form


def test_seed_modes() -> None:
    form = BlendForm(settings={**PROMPT, "seed": 5})
    assert with_next_seed(form, "fixed") == with_next_seed(form, "increment") == form
    drawn = [with_next_seed(form, "random").settings["seed"] for _ in range(4)]
    assert len(set(drawn)) > 1
    varied = with_next_seed(form, "variation").settings
    assert (varied["seed"], varied["variation"]) == (5, 0.2)
    assert varied["variation_seed"] > 0
    assert with_next_seed(BlendForm(settings={**PROMPT, "variation": 0.6}), "variation").settings["variation"] == 0.6
