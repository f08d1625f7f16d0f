"""The studio's view-model: forms, rows, rendering that can be stopped, and what visitors may not ask for."""

import json
import resource
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_diffusion.cli import main
from lora_diffusion.config.preset import BlendEntry, BlendWeight, Schedule
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError, LoRADiffusionError, OutputError
from lora_diffusion.library.recipe import read_recipe
from lora_diffusion.library.search import open_library
from lora_diffusion.models.load import module_at
from lora_diffusion_studio.backend.region_masks import save_mask, set_region
from lora_diffusion_studio.backend.studio import (
    Finished,
    ImageSaved,
    StepTaken,
    Studio,
    StudioPaths,
    check_name,
    stock_presets_folder,
)
from lora_diffusion_studio.view_models.adapter_card import make_thumbnail
from lora_diffusion_studio.view_models.adapter_slot import (
    CURVES,
    AdapterSlot,
    entry_from_slot,
    get_curve,
    get_option,
    normalize_options,
    slot_from_entry,
    with_curve,
    with_options,
)
from lora_diffusion_studio.view_models.blend_form import (
    BlendForm,
    form_from_request,
    format_command,
    make_request,
    with_next_seed,
)

PROMPT = {"prompt": "a gloop character in the snow, in zwx style", "num_inference_steps": 4, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("neon", "gloop"):
        shutil.copy(sample_data_folder() / "adapters" / f"{name}.safetensors", folder)
    return folder


@pytest.fixture
def studio(shelf: Path, tmp_path: Path) -> Studio:
    return Studio(StudioPaths(library=shelf, output=tmp_path / "out", bases=("tiny-sd",)))


def test_only_adapters_that_fit_are_offered(studio: Studio) -> None:
    cards = studio.cards("tiny-sd")
    assert [card.title for card in cards] == ["gloop", "neon"]
    assert "rank 8" in cards[0].about
    assert [card.title for card in studio.cards("tiny-sd", "zwx")] == ["neon"]
    with pytest.raises(ConfigError, match="not a base of this studio"):
        studio.cards("/etc")


def test_a_picture_is_the_command_lines(studio: Studio, tmp_path: Path) -> None:
    """Same pixels as the command that the form is copied as."""
    form = BlendForm(rows=BOTH, settings={**PROMPT, "seed": 7})
    events = list(studio.render(form))
    assert [type(event) for event in events] == [StepTaken, StepTaken, StepTaken, StepTaken, ImageSaved, Finished]
    assert [event.share for event in events if isinstance(event, StepTaken)] == [0.25, 0.5, 0.75, 1.0]
    made = next(event.path for event in events if isinstance(event, ImageSaved))
    words = shlex.split(format_command(form, studio.library(), tmp_path / "twin"))
    assert words[0] == "lora-diffusion"
    assert main(words[1:]) == 0
    with Image.open(made) as ours, Image.open(tmp_path / "twin" / "00000.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_stopping_leaves_the_base_as_it_was_and_nothing_half_written(studio: Studio) -> None:
    weight = module_at(studio.base("tiny-sd"), "unet.mid_block.attentions.0.proj_in").weight
    before = weight.clone()
    stream = studio.render(BlendForm(rows=BOTH, settings={**PROMPT, "num_inference_steps": 50}))
    assert isinstance(next(stream), StepTaken)
    stream.close()
    assert weight.equal(before)
    assert not list(studio.places.output.glob("*.png"))
    assert threading.active_count() < 10
    assert isinstance(list(studio.render(BlendForm(rows=BOTH, settings=PROMPT)))[-1], Finished)


def test_a_picture_restores_the_form(studio: Studio) -> None:
    rows = (with_options(BOTH[0], start="0.30", lbw="OUTALL"), with_options(BOTH[1], unet="0.5"))
    form = BlendForm(rows=rows, mode="composite", settings={**PROMPT, "seed": 3, "negative_prompt": "blurry"})
    made = next(event.path for event in studio.render(form) if isinstance(event, ImageSaved))
    again, notes = studio.restore_form(made)
    assert notes == ()
    library = studio.library()
    assert make_request(again, library).settings == read_recipe(made).settings
    found = [entry_from_slot(row, library).weight for row in again.rows]
    assert found == [entry.weight for entry in read_recipe(made).adapters]
    assert again.mode == "composite"


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning:bitsandbytes")
def test_a_studio_in_codes_makes_the_pictures_of_its_command(shelf: Path, studio: Studio, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    coded = Studio(StudioPaths(library=shelf, output=tmp_path / "coded", bases=("tiny-sd",), quantization="nf4"))
    form = BlendForm(rows=BOTH, settings=PROMPT)
    made = next(event.path for event in coded.render(form) if isinstance(event, ImageSaved))
    assert read_recipe(made).quantization == "nf4"
    assert "--quantize nf4" in coded.format_command(form)
    assert "--quantize" not in studio.format_command(form)
    assert coded.restore_form(made)[1] == ()
    assert studio.restore_form(made)[1] == ("made with quantize nf4; this studio has none",)


def test_a_preset_that_names_a_missing_adapter_offers_the_rest(studio: Studio, tmp_path: Path) -> None:
    table = json.loads((stock_presets_folder() / "neon-gloop.json").read_text())
    table["adapters"][1] |= {"path": "gone.safetensors", "name": "gone", "hash": "0" * 64}
    (tmp_path / "p.json").write_text(json.dumps(table))
    form, notes = studio.form_from_preset(tmp_path / "p.json")
    assert [row.name for row in form.rows] == ["neon.safetensors"]
    assert "gone: is not in the library" in notes[0]


def test_an_adapter_that_has_changed_is_not_taken_for_the_old_one(studio: Studio, tmp_path: Path) -> None:
    table = json.loads((stock_presets_folder() / "neon-gloop.json").read_text())
    table["adapters"] = [{"path": str(studio.places.library / "neon.safetensors"), "name": "neon", "hash": "1" * 64}]
    (tmp_path / "p.json").write_text(json.dumps(table))
    form, notes = studio.form_from_preset(tmp_path / "p.json")
    assert form.rows == ()
    assert "has changed since" in notes[0]


def test_a_weight_that_no_tag_can_say_is_kept_whole(studio: Studio) -> None:
    gates = {"IN01": Schedule(points=((0.0, 0.2), (1.0, 0.9)))}
    entry = BlendEntry(
        path=str(studio.places.library / "neon.safetensors"), weight=BlendWeight(value=0.7, blocks=gates)
    )
    row = slot_from_entry(entry, studio.library())
    assert row.full
    assert entry_from_slot(row, studio.library()).weight == entry.weight
    with pytest.raises(ConfigError, match="no short form"):
        format_command(BlendForm(rows=(row,), settings=PROMPT), studio.library(), Path("o"))


@given(
    weight=st.floats(-2, 3).map(lambda value: round(value, 2)),
    unet=st.none() | st.sampled_from(["0.5", "-1"]),
    blocks=st.sampled_from(["", "MIDD", "OUTALL"]),
    start=st.sampled_from(["", "0.2", "0.5"]),
    region=st.sampled_from(["", "box=0,0,0.5,1"]),
)
def test_rows_and_entries_say_the_same(weight: float, unet: str | None, blocks: str, start: str, region: str) -> None:
    library = open_library(sample_data_folder() / "adapters")
    row = with_options(
        AdapterSlot(name="ink.safetensors", weight=weight, options=region), unet=unet, lbw=blocks, start=start
    )
    entry = entry_from_slot(row, library)
    assert entry_from_slot(slot_from_entry(entry, library), library) == entry
    assert get_option(row, "lbw") == blocks
    assert normalize_options(row.options) == normalize_options(normalize_options(row.options))


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
def test_what_cannot_be_made_is_one_sentence(studio: Studio, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(studio.render(BlendForm(settings=settings)))
    assert words in str(caught.value)


@pytest.mark.parametrize("mask", ["/etc/passwd", "../../secret.png", "//host/share/a.png", "masks/../../x.png"])
def test_no_file_outside_the_studio_is_read_as_a_mask(studio: Studio, mask: str) -> None:
    rows = (AdapterSlot(name="neon.safetensors", options=f"mask={mask}"),)
    with pytest.raises(ConfigError, match="no mask of this studio"):
        studio.render(BlendForm(rows=rows, settings=PROMPT))


def test_no_file_outside_the_library_is_taken_for_an_adapter(studio: Studio, tmp_path: Path) -> None:
    shutil.copy(studio.places.library / "neon.safetensors", tmp_path / "other.safetensors")
    for name in (str(tmp_path / "other.safetensors"), "../other.safetensors"):
        with pytest.raises(ConfigError, match="no adapter called"):
            make_request(BlendForm(rows=(AdapterSlot(name=name),), settings=PROMPT), studio.library())


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "", " ", ".hidden", "a" * 61, "nul\0", "c:\\x"])
def test_names_that_would_be_paths_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        check_name(name)
    assert check_name(" My blend (2) ") == "My blend (2)"


def test_how_an_adapter_acts_is_drawn(studio: Studio) -> None:
    plain, late = (
        studio.draw_effect("tiny-sd", row).convert("RGB").tobytes()
        for row in (BOTH[0], with_options(BOTH[0], start="0.5"))
    )
    assert plain != late


def test_form_of_a_plan_of_a_form_is_the_form(studio: Studio) -> None:
    form = BlendForm(rows=BOTH, mode="switch", settings=PROMPT, composition={"switch_every": 3})
    again, missing = form_from_request(make_request(form, studio.library()), studio.library())
    assert missing == ()
    assert again == form


def test_what_is_painted_is_where_an_adapter_acts(studio: Studio) -> None:
    canvas = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    with pytest.raises(ConfigError, match="nothing is painted"):
        save_mask(studio, canvas)
    canvas.paste((124, 58, 237, 255), (0, 0, 32, 64))
    mask = save_mask(studio, canvas)
    assert save_mask(studio, canvas) == mask
    rows = set_region(BOTH, "neon.safetensors", mask)
    form = BlendForm(rows=tuple(rows), settings=PROMPT)
    region = studio.make_request(form).entries[0].region
    assert region
    assert Path(region.mask) == mask.resolve()
    assert isinstance(list(studio.render(form))[-1], Finished)
    assert set_region(rows, "neon.safetensors", None) == list(BOTH)
    with pytest.raises(ConfigError, match="on the table"):
        set_region(BOTH, "ink.safetensors", mask)


@pytest.fixture
def no_space() -> Iterator[None]:
    """A disk that takes no more than a kilobyte of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("no_space")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(studio: Studio) -> None:
    with pytest.raises(OutputError) as caught:
        list(studio.render(BlendForm(rows=BOTH, settings=PROMPT)))
    assert "00000.png" in str(caught.value)
    assert [path.name for path in studio.places.output.iterdir() if path.is_file()] == []


def test_a_damaged_adapter_is_not_offered_and_named_where_it_is_asked_for(studio: Studio, tmp_path: Path) -> None:
    library = tmp_path / "mixed"
    library.mkdir()
    shutil.copy(studio.places.library / "neon.safetensors", library)
    whole = (studio.places.library / "gloop.safetensors").read_bytes()
    (library / "gloop.safetensors").write_bytes(whole[: len(whole) // 2])
    mixed = Studio(StudioPaths(library=library, output=tmp_path / "out", bases=("tiny-sd",)))
    assert [card.title for card in mixed.cards("tiny-sd")] == ["neon"]
    with pytest.raises(LoRADiffusionError, match=r"gloop\.safetensors"):
        list(mixed.render(BlendForm(rows=BOTH, settings=PROMPT)))
    assert isinstance(list(mixed.render(BlendForm(rows=BOTH[:1], settings=PROMPT)))[-1], Finished)


@pytest.mark.parametrize("curve", list(CURVES.values()))
def test_each_way_over_the_steps_is_drawn_and_kept(studio: Studio, curve: str) -> None:
    row = with_curve(with_options(BOTH[0], lbw="MIDD"), curve)
    assert get_curve(row) == curve
    assert with_curve(row, "") == with_options(BOTH[0], lbw="MIDD")
    again = slot_from_entry(entry_from_slot(row, studio.library()), studio.library())
    assert entry_from_slot(again, studio.library()) == entry_from_slot(row, studio.library())
    assert studio.draw_effect("tiny-sd", row).size[0] > 100


def test_no_way_over_the_steps_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="no way over the steps"):
        with_curve(BOTH[0], "up and down")


def test_seeds_of_the_next_picture() -> None:
    form = BlendForm(settings={**PROMPT, "seed": 5})
    assert with_next_seed(form, "fixed") == with_next_seed(form, "next") == form
    drawn = [with_next_seed(form, "random").settings["seed"] for _ in range(4)]
    assert len(set(drawn)) > 1
    varied = with_next_seed(form, "vary").settings
    assert (varied["seed"], varied["variation"]) == (5, 0.2)
    assert varied["variation_seed"] > 0
    assert with_next_seed(BlendForm(settings={**PROMPT, "variation": 0.6}), "vary").settings["variation"] == 0.6


def test_a_card_has_a_picture_whatever_lies_beside_it(tmp_path: Path) -> None:
    assert (
        make_thumbnail("neon", None).size == make_thumbnail("neon", sample_data_folder() / "adapters" / "neon.png").size
    )
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert make_thumbnail("neon", tmp_path / "bad.png").tobytes() == make_thumbnail("neon", None).tobytes()
    assert make_thumbnail("neon", tmp_path / "gone.png").tobytes() == make_thumbnail("neon", None).tobytes()
