"""Adapter slots: options, schedules, and the conversion to preset entries."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.config.preset import BlendEntry, BlendWeight, Schedule
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.library.search import open_library
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import (
    SCHEDULES,
    AdapterSlot,
    entry_from_slot,
    get_option,
    get_schedule,
    normalize_options,
    slot_from_entry,
    with_options,
    with_schedule,
)
from lora_diffusion_studio.view_models.blend_form import BlendForm, format_command

PROMPT = {"prompt": "a gloop character in the snow, in zwx style", "num_inference_steps": 4, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))


def test_weight_without_tag_notation_is_kept_as_json(studio: Studio) -> None:
    gates = {"IN01": Schedule(points=((0.0, 0.2), (1.0, 0.9)))}
    entry = BlendEntry(
        path=str(studio.library_folder / "neon.safetensors"), weight=BlendWeight(value=0.7, blocks=gates)
    )
    slot = slot_from_entry(entry, studio.open_library())
    assert slot.weight_json
    assert entry_from_slot(slot, studio.open_library()).weight == entry.weight
    with pytest.raises(ConfigError, match="cannot be written as a flag"):
        format_command(BlendForm(slots=(slot,), settings=PROMPT), studio.open_library(), Path("o"))


@given(
    weight=st.floats(-2, 3).map(lambda value: round(value, 2)),
    unet=st.none() | st.sampled_from(["0.5", "-1"]),
    blocks=st.sampled_from(["", "MIDD", "OUTALL"]),
    start=st.sampled_from(["", "0.2", "0.5"]),
    region=st.sampled_from(["", "box=0,0,0.5,1"]),
)
def test_slot_and_entry_round_trip(weight: float, unet: str | None, blocks: str, start: str, region: str) -> None:
    library = open_library(sample_data_folder() / "adapters")
    slot = with_options(
        AdapterSlot(name="ink.safetensors", weight=weight, options=region), unet=unet, lbw=blocks, start=start
    )
    entry = entry_from_slot(slot, library)
    assert entry_from_slot(slot_from_entry(entry, library), library) == entry
    assert get_option(slot, "lbw") == blocks
    assert normalize_options(slot.options) == normalize_options(normalize_options(slot.options))


@pytest.mark.parametrize("schedule", list(SCHEDULES.values()))
def test_each_schedule_is_plotted_and_kept(studio: Studio, schedule: str) -> None:
    slot = with_schedule(with_options(BOTH[0], lbw="MIDD"), schedule)
    assert get_schedule(slot) == schedule
    assert with_schedule(slot, "") == with_options(BOTH[0], lbw="MIDD")
    again = slot_from_entry(entry_from_slot(slot, studio.open_library()), studio.open_library())
    assert entry_from_slot(again, studio.open_library()) == entry_from_slot(slot, studio.open_library())
    assert studio.plot_weight("tiny-sd", slot).size[0] > 100


def test_invalid_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a weight schedule"):
        with_schedule(BOTH[0], "up and down")
