"""The files of the adapter library."""

import json

import pytest

from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion_studio.backend.adapter_library import (
    AdapterNotes,
    convert_adapter,
    inspect_rows,
    read_notes,
    rename_adapter,
    save_plots,
    set_preview,
    verify_adapter,
    write_notes,
)
from lora_diffusion_studio.backend.generation import ImageSaved, generate
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm

PROMPT = {"prompt": "a red house, in zwx style", "num_inference_steps": 2, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))
FORM = BlendForm(slots=BOTH, settings=PROMPT)


def test_adapter_is_inspected_annotated_renamed_and_converted(studio: Studio) -> None:
    assert ("trigger words", "zwx") in inspect_rows(studio, "neon.safetensors")
    assert ("ranks", "min 8, median 8, max 8") in inspect_rows(studio, "neon.safetensors")
    assert "ok" in verify_adapter(studio, "neon.safetensors", "tiny-sd")
    (studio.library_folder / "neon.json").write_text('{"sd version": "SD1", "preferred weight": 0.4}')
    write_notes(
        studio,
        "neon.safetensors",
        AdapterNotes(preferred_weight=0.7, weight_range=(-3, 3), trigger_words="zwx, glow", notes="mind the sky"),
    )
    assert read_notes(studio, "neon.safetensors").notes == "mind the sky"
    assert studio.get_card("neon.safetensors").weight_range == (-3, 3)
    with pytest.raises(ConfigError, match="must be less than"):
        write_notes(studio, "neon.safetensors", AdapterNotes(weight_range=(1, 1)))
    assert json.loads((studio.library_folder / "neon.json").read_text())["sd version"] == "SD1"
    assert studio.get_card("neon.safetensors").preferred_weight == 0.7
    image = next(event.path for event in generate(studio, FORM) if isinstance(event, ImageSaved))
    set_preview(studio, "neon.safetensors", image)
    assert rename_adapter(studio, "neon.safetensors", "night") == "night.safetensors"
    assert sorted(path.name for path in studio.library_folder.glob("night*")) == [
        "night.json",
        "night.png",
        "night.safetensors",
    ]
    path, _ = convert_adapter(studio, "night.safetensors", "kohya")
    assert load_adapter(path).metadata.source_format == "kohya"
    with pytest.raises(ConfigError, match="already exists"):
        rename_adapter(studio, "gloop.safetensors", "night")


def test_adapters_are_plotted_together(studio: Studio) -> None:
    drawn = save_plots(studio, ["neon.safetensors", "gloop.safetensors"], "tiny-sd")
    assert {path.suffix for path in drawn} == {".png"}
    assert len(drawn) > 2
    with pytest.raises(ConfigError, match="choose one or more adapters"):
        save_plots(studio, [], "tiny-sd")
