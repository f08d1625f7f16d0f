"""The API endpoints."""

from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion_studio.api import parse_adapter_slot
from lora_diffusion_studio.backend.generation import ImageSaved, generate
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.blend_form import BlendForm
from tests.helpers.server_end import close_quietly

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def test_concurrent_api_clients_get_the_images_of_the_library(tmp_path: Path) -> None:
    """Two clients at once, each gets its own image, equal to the one that the library makes alone."""
    from gradio_client import Client

    from lora_diffusion_studio.app import serve

    config = StudioConfig(library=sample_data_folder() / "adapters", output=tmp_path / "out", api=True)
    studio, messages = Studio(config), list[str]()
    app = serve(studio, block=False, report=messages.append)
    clients = [Client(messages[0].split()[5], verbose=False) for _ in range(2)]
    assert {card["name"] for card in clients[0].predict(api_name="/adapters")} >= {"neon.safetensors"}
    asked = [("a red house, in zwx style", "neon:0.7"), ("a blue cat, in sks style", "ink:0.9:start=0.2")]
    jobs = [
        client.submit(prompt=prompt, adapters=[adapter], num_inference_steps=4, api_name="/generate")
        for client, (prompt, adapter) in zip(clients, asked, strict=True)
    ]
    images = [Path(job.result()["images"][0]) for job in jobs]
    with pytest.raises(Exception, match="the prompt is empty"):
        clients[0].predict(prompt=" ", adapters=[], api_name="/generate")
    close_quietly(app)
    for (prompt, adapter), image in zip(asked, images, strict=True):
        form = BlendForm(
            slots=(parse_adapter_slot(adapter),),
            settings={"prompt": prompt, "num_inference_steps": 4, "seed": 0, "guidance_scale": 4.0},
        )
        expected = next(event.path for event in generate(studio, form) if isinstance(event, ImageSaved))
        with Image.open(expected) as ours, Image.open(image) as theirs:
            assert ours.tobytes() == theirs.tobytes()
