"""Axes of image grids: parsing, changed settings, and blends without one block."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.adapters.coefficients import block_factors
from lora_diffusion.architectures.blocks import vector_block_names
from lora_diffusion.config.generate import GRID_SETTINGS, GenerateConfig
from lora_diffusion.config.preset import BlendEntry, BlendWeight, Composition, Schedule
from lora_diffusion.errors import ConfigError
from lora_diffusion.models.locate import find_checkpoint
from lora_diffusion.workflows.images.grid_axes import (
    CHANGES,
    NOTHING,
    TEXTS,
    GridAxis,
    expand_grid,
    find_entry,
    format_axis,
    parse_axis,
    without_blocks,
)
from lora_diffusion.workflows.images.request import GenerationRequest

LAYOUT = find_checkpoint("tiny-sd").layout
SCHEDULE = Schedule(points=((0.0, 0.0), (0.5, 1.0)))
ENTRIES = (
    BlendEntry(path="/adapters/neon.safetensors", weight=BlendWeight(value=0.6, blocks="OUTALL", schedule=SCHEDULE)),
    BlendEntry(path="/adapters/old/gloop.safetensors", weight=0.8),
)
REQUEST = GenerationRequest(base="tiny-sd", entries=ENTRIES, settings=GenerateConfig(prompt="a house", count=3))
words = st.text(string.ascii_lowercase + " ", min_size=1).map(str.strip).filter(bool)


@given(
    what=st.sampled_from([w for w in CHANGES if w != NOTHING]), of=st.sampled_from(["", "neon", "2"]), data=st.data()
)
def test_parse_axis_inverts_format_axis(what: str, of: str, data: st.DataObject) -> None:
    value = words if what in TEXTS else st.sampled_from(["0", "0.5", "-1", "MIDD"])
    side = GridAxis(what=what, values=tuple(data.draw(st.lists(value, min_size=1, max_size=4))), of=of)
    assert parse_axis(format_axis(side)) == side
    assert len(side.labels) == len(side.values)


def test_grid_has_each_pair_of_values_once_and_changes_nothing_else() -> None:
    rows = expand_grid(
        REQUEST, GridAxis(what="weight", values=("0", "1"), of="gloop"), GridAxis(what="seed", values=("5", "6", "7"))
    )
    assert [[cell.settings.seed for cell in row] for row in rows] == [[5, 5], [6, 6], [7, 7]]
    assert [cell.entries[1].weight for cell in rows[0]] == [0.0, 1.0]
    for row in rows:
        for cell in row:
            assert cell.entries[0] == ENTRIES[0]
            assert cell.settings == REQUEST.settings.model_copy(update={"count": 1, "seed": cell.settings.seed})
            assert cell.composition == REQUEST.composition


def test_changed_weight_keeps_its_blocks_and_schedule() -> None:
    cell = expand_grid(REQUEST, GridAxis(what="weight", values=("2",)), GridAxis())[0][0]
    assert cell.entries[0].weight == BlendWeight(value=2.0, blocks="OUTALL", schedule=SCHEDULE)
    cell = expand_grid(REQUEST, GridAxis(what="block preset", values=("MIDD",)), GridAxis())[0][0]
    assert cell.entries[0].weight == BlendWeight(value=0.6, blocks="MIDD", schedule=SCHEDULE)


def test_axes_of_single_adapters_and_of_modes() -> None:
    first, second = expand_grid(REQUEST, GridAxis(what="adapter", values=("gloop", "neon")), GridAxis())[0]
    assert (first.entries, second.entries) == (ENTRIES[1:], ENTRIES[:1])
    switched = expand_grid(REQUEST, GridAxis(what="mode", values=("switch",)), GridAxis())[0][0]
    assert switched.composition == Composition(mode="switch")


@pytest.mark.parametrize("of", ["gloop", "gloop.safetensors", "old/gloop.safetensors", "2"])
def test_adapter_is_found_by_name_file_path_or_number(of: str) -> None:
    assert find_entry(ENTRIES, of) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weight", "SETTING=VALUES"),
        ("weight=", "no values"),
        ("weight=a", "is not a number"),
        ("weight:zuki=1", "is not an adapter of the blend; expected one of neon, gloop"),
        ("new/gloop=1", "is not a setting that a grid can vary"),
        ("steps=0", "steps"),
        ("scheduler=fast", "scheduler"),
        ("mode=mixed", "mode"),
        ("weight=inf", "value"),
        ("seed=" + ",".join(map(str, range(65))), "64 at most"),
    ],
)
def test_invalid_axes_are_rejected_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_grid(REQUEST, parse_axis(text), GridAxis())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_blocks_leaves_out_each_block_once() -> None:
    requests = without_blocks(REQUEST, "neon", LAYOUT)
    assert requests.pop("").entries == ENTRIES
    assert list(requests) == list(vector_block_names(LAYOUT)[1])
    before = block_factors("OUTALL", LAYOUT)
    for block, request in requests.items():
        weight = request.entries[0].weight
        assert isinstance(weight, BlendWeight)
        assert block_factors(weight.blocks, LAYOUT) == {**before, block: 0.0}  # type: ignore[arg-type]
        assert (weight.value, weight.schedule) == (0.6, SCHEDULE)
        assert request.entries[1] == ENTRIES[1]


def test_the_help_of_grid_lists_all_settings_that_can_vary() -> None:
    assert {*GRID_SETTINGS, NOTHING} == set(CHANGES)
