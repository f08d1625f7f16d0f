"""Presets in the studio."""

import json
from pathlib import Path

import pytest

from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError, OutputError
from lora_diffusion.library.presets import read_preset
from lora_diffusion_studio.backend.generation import ImageSaved, generate
from lora_diffusion_studio.backend.presets import (
    delete_preset,
    get_preset,
    import_preset,
    list_saved_presets,
    rename_preset,
    save_preset,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm, make_request

PROMPT = {"prompt": "a red house, in zwx style", "num_inference_steps": 2, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))
FORM = BlendForm(slots=BOTH, settings=PROMPT)


def test_presets_are_saved_renamed_and_deleted(studio: Studio) -> None:
    image = next(event.path for event in generate(studio, FORM) if isinstance(event, ImageSaved))
    saved = save_preset(studio, FORM, "My blend", "for evenings", image, overwrite=False)
    assert saved.thumbnail
    assert [each.name for each in list_saved_presets(studio)] == [
        "My blend",
        "neon-gloop (built-in)",
        "watercolour-zuki (built-in)",
    ]
    form, notes = studio.form_from_preset(get_preset(studio, "My blend").path)
    assert notes == ()
    assert make_request(form, studio.open_library()) == make_request(FORM, studio.open_library())
    with pytest.raises(OutputError, match="already exists"):
        save_preset(studio, FORM, "My blend", "", None, overwrite=False)
    renamed = rename_preset(studio, "My blend", "Better")
    assert renamed.thumbnail
    assert renamed.thumbnail.stem == "Better"
    delete_preset(studio, "Better")
    assert (studio.config.output / "deleted presets" / "Better.json").is_file()
    with pytest.raises(ConfigError, match="built-in presets cannot be changed"):
        delete_preset(studio, "neon-gloop (built-in)")
    with pytest.raises(ConfigError, match="is not a valid name"):
        save_preset(studio, FORM, "../up", "", None, overwrite=False)


def test_imported_preset_refers_to_the_library(studio: Studio, tmp_path: Path) -> None:
    table = json.loads((sample_data_folder() / "presets" / "neon-gloop.json").read_text())
    (tmp_path / "theirs.json").write_text(json.dumps(table))
    saved = import_preset(studio, tmp_path / "theirs.json", "theirs")
    paths = [(saved.path.parent / entry.path).resolve() for entry in read_preset(saved.path).adapters]
    assert {path.parent for path in paths} == {studio.library_folder}
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"no\.json"):
        import_preset(studio, tmp_path / "no.json", "no")
