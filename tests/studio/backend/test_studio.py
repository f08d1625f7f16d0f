"""The studio's adapters, forms and block plots."""

import json
import shutil
from pathlib import Path

import pytest

from lora_diffusion.config.studio import StudioConfig
from lora_diffusion.errors import ConfigError, LoRADiffusionError
from lora_diffusion.library.recipe import read_recipe
from lora_diffusion_studio.backend.config import packaged_presets_folder
from lora_diffusion_studio.backend.generation import GenerationDone, ImageSaved, generate
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot, entry_from_slot, with_options
from lora_diffusion_studio.view_models.blend_form import BlendForm, make_request

PROMPT = {"prompt": "a gloop character in the snow, in zwx style", "num_inference_steps": 4, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))


def test_list_cards_has_only_adapters_that_fit_the_base(studio: Studio) -> None:
    cards = studio.list_cards("tiny-sd")
    assert [card.title for card in cards] == ["gloop", "neon"]
    assert "rank 8" in cards[0].summary
    assert [card.title for card in studio.list_cards("tiny-sd", "zwx")] == ["neon"]
    with pytest.raises(ConfigError, match="not one of this studio's base models"):
        studio.list_cards("/etc")


def test_form_from_image_restores_all_settings(studio: Studio) -> None:
    slots = (with_options(BOTH[0], start="0.30", lbw="OUTALL"), with_options(BOTH[1], unet="0.5"))
    form = BlendForm(slots=slots, mode="composite", settings={**PROMPT, "seed": 3, "negative_prompt": "blurry"})
    made = next(event.path for event in generate(studio, form) if isinstance(event, ImageSaved))
    again, notes = studio.form_from_image(made)
    assert notes == ()
    library = studio.open_library()
    assert make_request(again, library).settings == read_recipe(made).settings
    found = [entry_from_slot(slot, library).weight for slot in again.slots]
    assert found == [entry.weight for entry in read_recipe(made).adapters]
    assert again.mode == "composite"


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning:bitsandbytes")
def test_quantized_studio_records_its_quantization(studio: Studio, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = Studio(
        StudioConfig(library=studio.library_folder, output=tmp_path / "quantized", bases=("tiny-sd",), quantize="nf4")
    )
    form = BlendForm(slots=BOTH, settings=PROMPT)
    made = next(event.path for event in generate(quantized, form) if isinstance(event, ImageSaved))
    assert read_recipe(made).quantization == "nf4"
    assert "--quantize nf4" in quantized.format_command(form)
    assert "--quantize" not in studio.format_command(form)
    assert quantized.form_from_image(made)[1] == ()
    assert studio.form_from_image(made)[1] == ("the image was made with --quantize nf4; this studio uses none",)


def test_preset_without_a_missing_adapter_is_loaded_with_a_note(studio: Studio, tmp_path: Path) -> None:
    table = json.loads((packaged_presets_folder() / "neon-gloop.json").read_text())
    table["adapters"][1] |= {"path": "gone.safetensors", "name": "gone", "hash": "0" * 64}
    (tmp_path / "p.json").write_text(json.dumps(table))
    form, notes = studio.form_from_preset(tmp_path / "p.json")
    assert [slot.name for slot in form.slots] == ["neon.safetensors"]
    assert "gone: is not in the library" in notes[0]


def test_changed_adapter_is_left_out_with_a_note(studio: Studio, tmp_path: Path) -> None:
    table = json.loads((packaged_presets_folder() / "neon-gloop.json").read_text())
    table["adapters"] = [{"path": str(studio.library_folder / "neon.safetensors"), "name": "neon", "hash": "1" * 64}]
    (tmp_path / "p.json").write_text(json.dumps(table))
    form, notes = studio.form_from_preset(tmp_path / "p.json")
    assert form.slots == ()
    assert "has changed since" in notes[0]


@pytest.mark.parametrize("mask", ["/etc/passwd", "../../secret.png", "//host/share/a.png", "masks/../../x.png"])
def test_masks_outside_the_studio_are_refused(studio: Studio, mask: str) -> None:
    slots = (AdapterSlot(name="neon.safetensors", options=f"mask={mask}"),)
    with pytest.raises(ConfigError, match="only reads masks"):
        generate(studio, BlendForm(slots=slots, settings=PROMPT))


def test_adapters_outside_the_library_are_refused(studio: Studio, tmp_path: Path) -> None:
    shutil.copy(studio.library_folder / "neon.safetensors", tmp_path / "other.safetensors")
    for name in (str(tmp_path / "other.safetensors"), "../other.safetensors"):
        with pytest.raises(ConfigError, match="no adapter called"):
            make_request(BlendForm(slots=(AdapterSlot(name=name),), settings=PROMPT), studio.open_library())


def test_plot_depends_on_the_weight(studio: Studio) -> None:
    plain, late = (
        studio.plot_weight("tiny-sd", slot).convert("RGB").tobytes()
        for slot in (BOTH[0], with_options(BOTH[0], start="0.5"))
    )
    assert plain != late


def test_damaged_adapter_is_not_listed_and_named_in_the_error(studio: Studio, tmp_path: Path) -> None:
    library = tmp_path / "mixed"
    library.mkdir()
    shutil.copy(studio.library_folder / "neon.safetensors", library)
    whole = (studio.library_folder / "gloop.safetensors").read_bytes()
    (library / "gloop.safetensors").write_bytes(whole[: len(whole) // 2])
    mixed = Studio(StudioConfig(library=library, output=tmp_path / "out", bases=("tiny-sd",)))
    assert [card.title for card in mixed.list_cards("tiny-sd")] == ["neon"]
    with pytest.raises(LoRADiffusionError, match=r"gloop\.safetensors"):
        list(generate(mixed, BlendForm(slots=BOTH, settings=PROMPT)))
    assert isinstance(list(generate(mixed, BlendForm(slots=BOTH[:1], settings=PROMPT)))[-1], GenerationDone)
