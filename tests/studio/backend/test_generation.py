"""Image generation: equality with the command line, stopping, errors."""

import resource
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.cli import main
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.models.load import module_at
from lora_diffusion_studio.backend.generation import GenerationDone, ImageSaved, StepDone, generate
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm, format_command

PROMPT = {"prompt": "a gloop character in the snow, in zwx style", "num_inference_steps": 4, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))


@pytest.mark.parametrize("composition", [{}, {"parallel": True}], ids=["in the weights", "parallel"])
def test_image_equals_that_of_the_command_line(studio: Studio, composition: dict[str, object], tmp_path: Path) -> None:
    """The equivalent command makes the same pixels."""
    form = BlendForm(slots=BOTH, settings={**PROMPT, "seed": 7}, composition=composition)
    events = list(generate(studio, form))
    assert [type(event) for event in events] == [StepDone, StepDone, StepDone, StepDone, ImageSaved, GenerationDone]
    assert [event.fraction for event in events if isinstance(event, StepDone)] == [0.25, 0.5, 0.75, 1.0]
    made = next(event.path for event in events if isinstance(event, ImageSaved))
    words = shlex.split(format_command(form, studio.open_library(), tmp_path / "expected"))
    assert words[0] == "lora-diffusion"
    assert main(words[1:]) == 0
    with Image.open(made) as ours, Image.open(tmp_path / "expected" / "00000.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_stopping_restores_the_base_and_leaves_no_partial_file(studio: Studio) -> None:
    weight = module_at(studio.load_base("tiny-sd"), "unet.mid_block.attentions.0.proj_in").weight
    before = weight.clone()
    stream = generate(studio, BlendForm(slots=BOTH, settings={**PROMPT, "num_inference_steps": 50}))
    assert isinstance(next(stream), StepDone)
    stream.close()
    assert weight.equal(before)
    assert not list(studio.config.output.glob("*.png"))
    assert threading.active_count() < 10
    assert isinstance(list(generate(studio, BlendForm(slots=BOTH, settings=PROMPT)))[-1], GenerationDone)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({**PROMPT, "width": 30_000}, "at most 2048"),
        ({**PROMPT, "count": 17}, "at most 16"),
        ({**PROMPT, "num_inference_steps": 100_000}, "at most 200"),
        ({**PROMPT, "width": 33}, "width"),
        ({"prompt": "a (cat"}, "opens a '('"),
        ({"prompt": "<lora:nobody>"}, "no adapter called 'nobody'"),
    ],
)
def test_invalid_settings_are_refused(studio: Studio, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(generate(studio, BlendForm(settings=settings)))
    assert words in str(caught.value)


@pytest.fixture
def no_space(studio: Studio) -> Iterator[None]:  # noqa: ARG001 (the library is copied before the limit is set)
    """A disk that takes no more than a kilobyte of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("no_space")
def test_full_disk_is_reported_and_leaves_no_file(studio: Studio) -> None:
    with pytest.raises(OutputError) as caught:
        list(generate(studio, BlendForm(slots=BOTH, settings=PROMPT)))
    assert "00000.png" in str(caught.value)
    assert [path.name for path in studio.config.output.iterdir() if path.is_file()] == []
