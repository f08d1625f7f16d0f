"""XY grids and block effects."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.cli import main
from lora_diffusion.errors import ConfigError
from lora_diffusion.workflows.images.grid_axes import NOTHING, make_axis
from lora_diffusion_studio.backend.comparison_grid import (
    GridDone,
    format_comparison_commands,
    measure_block_effects,
    render_grid,
)
from lora_diffusion_studio.backend.generation import ImageSaved
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm

PROMPT = {"prompt": "a red house, in zwx style", "num_inference_steps": 2, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))
FORM = BlendForm(slots=BOTH, settings=PROMPT)


def test_grid_carries_the_recipe_of_each_image(studio: Studio) -> None:
    events = list(render_grid(studio, FORM, make_axis("weight", "0, 1", "gloop.safetensors"), make_axis("seed", "3,4")))
    made = [event.path for event in events if isinstance(event, ImageSaved)]
    assert len(made) == 4
    sheet = events[-1]
    assert isinstance(sheet, GridDone)
    with Image.open(sheet.path) as image:
        metadata = json.loads(image.info["lora_diffusion_grid"])
    assert metadata["across"]["values"] == ["0", "1"]
    recipes = [json.loads(text) for row in metadata["recipes"] for text in row]
    assert [recipe["settings"]["seed"] for recipe in recipes] == [3, 3, 4, 4]
    assert [recipe["adapters"][1]["weight"] for recipe in recipes] == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("what", "values", "words"),
    [
        ("weight", "a, b", "is not a number"),
        ("weight", "", "no values"),
        ("adapter", "nobody", "is not an adapter of the blend"),
        ("mode", "mixed", "mode"),
        ("seed", ",".join(map(str, range(65))), "64 at most"),
        ("taste", "1", "is not a setting"),
    ],
)
def test_invalid_grid_is_refused_before_the_first_image(studio: Studio, what: str, values: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(render_grid(studio, FORM, make_axis(what, values), make_axis(NOTHING, "")))
    assert words in str(caught.value)
    assert not list(studio.config.output.glob("*.png"))


def test_block_effects_are_sorted_by_strength(studio: Studio) -> None:
    form = BlendForm(slots=BOTH[:1], settings=PROMPT)
    effects = list(measure_block_effects(studio, form, "neon.safetensors"))[-1]
    assert isinstance(effects, tuple)
    changes = [effect.change for effect in effects]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    assert len({effect.block for effect in effects}) == len(effects) > 4


def test_grid_equals_that_of_the_command_line(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    across, down = (
        make_axis("weight", "0, 1", "gloop.safetensors"),
        make_axis("prompt", "a red house | a blue house", ""),
    )
    sheet = list(render_grid(studio, FORM, across, down))[-1]
    assert isinstance(sheet, GridDone)
    grid, blocks = format_comparison_commands(studio, FORM, across, down, "neon.safetensors").splitlines()
    assert main(shlex.split(grid)[1:]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again != sheet.path
    with Image.open(sheet.path) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()
    assert main(shlex.split(blocks)[1:]) == 0
    assert "OUT00" in capsys.readouterr().out
