"""What the studio's other tabs do, without a browser: presets, grids, merges, the shelf, training."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.cli import main
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError, DatasetError, OutputError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.library.presets import read_preset
from lora_diffusion.workflows.images.grid_axes import NOTHING, make_axis
from lora_diffusion_studio.comparing import GridDone, compare_commands, measure_block_effects, render_grid
from lora_diffusion_studio.forms import BlendForm, make_request
from lora_diffusion_studio.keeping import (
    discard_preset,
    get_preset,
    import_preset,
    list_saved_presets,
    rename_preset,
    save_form,
)
from lora_diffusion_studio.merging import (
    MergeDone,
    MergeTarget,
    WriteProgress,
    format_merge_command,
    run_merge,
    summarize_merge,
)
from lora_diffusion_studio.rows import AdapterSlot
from lora_diffusion_studio.shelf import (
    AdapterNotes,
    convert_adapter,
    draw_plots,
    inspect_rows,
    read_notes,
    rename_adapter,
    set_preview,
    verify_adapter,
    write_notes,
)
from lora_diffusion_studio.studio import ImageSaved, Studio, StudioPaths
from lora_diffusion_studio.training import Job, RunManager

PROMPT = {"prompt": "a red house, in zwx style", "num_inference_steps": 2, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))
FORM = BlendForm(rows=BOTH, settings=PROMPT)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    library = tmp_path / "library"
    library.mkdir()
    for name in ("neon", "gloop"):
        shutil.copy(sample_data_folder() / "adapters" / f"{name}.safetensors", library)
    return Studio(StudioPaths(library=library, output=tmp_path / "out", bases=("tiny-sd",)))


def test_presets_are_kept_renamed_and_removed(studio: Studio) -> None:
    picture = next(event.path for event in studio.render(FORM) if isinstance(event, ImageSaved))
    kept = save_form(studio, FORM, "My blend", "for evenings", picture, replace=False)
    assert kept.thumbnail
    assert [each.name for each in list_saved_presets(studio)] == [
        "My blend",
        "neon-gloop (ready)",
        "watercolour-zuki (ready)",
    ]
    form, notes = studio.form_from_preset(get_preset(studio, "My blend").path)
    assert notes == ()
    assert make_request(form, studio.library()) == make_request(FORM, studio.library())
    with pytest.raises(OutputError, match="already exists"):
        save_form(studio, FORM, "My blend", "", None, replace=False)
    renamed = rename_preset(studio, "My blend", "Better")
    assert renamed.thumbnail
    assert renamed.thumbnail.stem == "Better"
    discard_preset(studio, "Better")
    assert (studio.places.output / "discarded" / "Better.json").is_file()
    with pytest.raises(ConfigError, match="comes with the package"):
        discard_preset(studio, "neon-gloop (ready)")
    with pytest.raises(ConfigError, match="cannot be a name"):
        save_form(studio, FORM, "../up", "", None, replace=False)


def test_a_preset_of_another_place_is_brought_in_with_what_is_here(studio: Studio, tmp_path: Path) -> None:
    table = json.loads((sample_data_folder() / "presets" / "neon-gloop.json").read_text())
    (tmp_path / "theirs.json").write_text(json.dumps(table))
    kept = import_preset(studio, tmp_path / "theirs.json", "theirs")
    paths = [(kept.path.parent / entry.path).resolve() for entry in read_preset(kept.path).adapters]
    assert {path.parent for path in paths} == {studio.places.library}
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"no\.json"):
        import_preset(studio, tmp_path / "no.json", "no")


def test_a_grid_is_its_pictures_side_by_side(studio: Studio) -> None:
    events = list(render_grid(studio, FORM, make_axis("weight", "0, 1", "gloop.safetensors"), make_axis("seed", "3,4")))
    made = [event.path for event in events if isinstance(event, ImageSaved)]
    assert len(made) == 4
    sheet = events[-1]
    assert isinstance(sheet, GridDone)
    with Image.open(sheet.path) as image:
        facts = json.loads(image.info["lora_diffusion_grid"])
    assert facts["across"]["values"] == ["0", "1"]
    recipes = [json.loads(text) for row in facts["recipes"] for text in row]
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
def test_a_grid_that_cannot_be_is_one_sentence(studio: Studio, what: str, values: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(render_grid(studio, FORM, make_axis(what, values), make_axis(NOTHING, "")))
    assert words in str(caught.value)
    assert not list(studio.places.output.glob("*.png"))


def test_blocks_are_measured_strongest_first(studio: Studio) -> None:
    form = BlendForm(rows=BOTH[:1], settings=PROMPT)
    effects = list(measure_block_effects(studio, form, "neon.safetensors"))[-1]
    assert isinstance(effects, tuple)
    changes = [effect.change for effect in effects]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    assert len({effect.block for effect in effects}) == len(effects) > 4


def test_a_grid_and_its_copied_command_are_the_same_picture(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    across, down = (
        make_axis("weight", "0, 1", "gloop.safetensors"),
        make_axis("prompt", "a red house | a blue house", ""),
    )
    sheet = list(render_grid(studio, FORM, across, down))[-1]
    assert isinstance(sheet, GridDone)
    grid, blocks = compare_commands(studio, FORM, across, down, "neon.safetensors").splitlines()
    assert main(shlex.split(grid)[1:]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again != sheet.path
    with Image.open(sheet.path) as first, Image.open(again) as second:
        assert first.tobytes() == second.tobytes()
    assert main(shlex.split(blocks)[1:]) == 0
    assert "OUT00" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_a_merge_is_the_command_lines(studio: Studio, kind: str, tmp_path: Path) -> None:
    target = MergeTarget(name="both", kind=kind)
    assert "neon at 0.6, gloop at 0.8" in summarize_merge(studio, FORM, target)
    written = list(run_merge(studio, FORM, target))[-1]
    assert isinstance(written, MergeDone)
    words = shlex.split(format_merge_command(studio, FORM, target))[1:]
    twin = tmp_path / written.path.name
    assert main([str(twin) if word.endswith(written.path.name) else word for word in words]) == 0
    files = (
        [(written.path, twin)]
        if kind == "adapter"
        else [(path, twin / path.relative_to(written.path)) for path in written.path.rglob("*.safetensors")]
    )
    assert files
    if kind == "adapter":
        assert load_adapter(written.path).hash == load_adapter(twin).hash
    else:
        assert all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in files)
    with pytest.raises(ConfigError, match="is there already"):
        summarize_merge(studio, FORM, target)


def test_a_merge_tells_how_far_it_is_and_can_be_stopped(studio: Studio) -> None:
    target = MergeTarget(name="both", kind="file", precision="float16")
    stream = run_merge(studio, FORM, target)
    while not (isinstance(event := next(stream), WriteProgress) and event.share > 0.2):
        pass
    stream.close()
    assert not any((studio.places.output / "merged").iterdir())
    events = list(run_merge(studio, FORM, target))
    shares = [event.share for event in events if isinstance(event, WriteProgress)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert isinstance(events[-1], MergeDone)


@pytest.mark.parametrize("precision", ["keep", "float16", "bfloat16"])
def test_what_precision_takes_is_known_before(studio: Studio, precision: str) -> None:
    target = MergeTarget(name="both", precision=precision)
    told = float(re.findall(r"about ([\d.]+)% of", summarize_merge(studio, FORM, target))[0])
    done = list(run_merge(studio, FORM, target))[-1]
    assert isinstance(done, MergeDone)
    measured = float(re.findall(r"rounding took ([\d.]+)%", done.text)[0])
    assert abs(told - measured) <= 0.25 * measured


def test_what_weights_cannot_hold_is_not_merged(studio: Studio) -> None:
    for form, words in (
        (BlendForm(rows=BOTH, mode="composite", settings=PROMPT), "cannot be held by weights"),
        (BlendForm(settings=PROMPT), "no adapter is on the table"),
    ):
        with pytest.raises(ConfigError, match=words):
            summarize_merge(studio, form, MergeTarget(name="x"))
    with pytest.raises(ConfigError, match="cannot be a name"):
        summarize_merge(studio, FORM, MergeTarget(name="../../x"))


def test_an_adapter_is_looked_at_noted_renamed_and_converted(studio: Studio) -> None:
    assert ("trigger words", '["zwx"]') in inspect_rows(studio, "neon.safetensors")
    assert "ok" in verify_adapter(studio, "neon.safetensors", "tiny-sd")
    (studio.places.library / "neon.json").write_text('{"sd version": "SD1", "preferred weight": 0.4}')
    write_notes(
        studio, "neon.safetensors", AdapterNotes(weight=0.7, range=(-3, 3), triggers="zwx, glow", notes="mind the sky")
    )
    assert read_notes(studio, "neon.safetensors").notes == "mind the sky"
    assert studio.card("neon.safetensors").range == (-3, 3)
    with pytest.raises(ConfigError, match="rising"):
        write_notes(studio, "neon.safetensors", AdapterNotes(range=(1, 1)))
    assert json.loads((studio.places.library / "neon.json").read_text())["sd version"] == "SD1"
    assert studio.card("neon.safetensors").preferred == 0.7
    picture = next(event.path for event in studio.render(FORM) if isinstance(event, ImageSaved))
    set_preview(studio, "neon.safetensors", picture)
    assert rename_adapter(studio, "neon.safetensors", "night") == "night.safetensors"
    assert sorted(path.name for path in studio.places.library.glob("night*")) == [
        "night.json",
        "night.png",
        "night.safetensors",
    ]
    path, _ = convert_adapter(studio, "night.safetensors", "kohya")
    assert load_adapter(path).metadata.source_format == "kohya"
    with pytest.raises(ConfigError, match="there is an adapter of that name"):
        rename_adapter(studio, "gloop.safetensors", "night")


def test_adapters_are_drawn_together(studio: Studio) -> None:
    drawn = draw_plots(studio, ["neon.safetensors", "gloop.safetensors"], "tiny-sd")
    assert {path.suffix for path in drawn} == {".png"}
    assert len(drawn) > 2
    with pytest.raises(ConfigError, match="choose one"):
        draw_plots(studio, [], "tiny-sd")


def waited(trainer: RunManager, name: str, *, steps: int = 0) -> str:
    """The state's text when the run has ended, or has come so far."""
    for _ in range(900):
        state = trainer.state(name)
        if not state.running or (steps and len(state.losses) >= steps):
            return state.text
        time.sleep(0.2)
    raise AssertionError(trainer.state(name).text)


def test_a_run_is_started_stopped_gone_on_with_and_put_on_the_shelf(studio: Studio) -> None:
    trainer = RunManager(studio)
    source = sample_data_folder() / "styles" / "ink"
    rows = trainer.add_pictures("my ink", [*sorted(source.glob("0[0-3].png")), *sorted(source.glob("0[0-2].txt"))])
    assert [caption == "" for _, caption in rows] == [False, False, False, True]
    with pytest.raises(DatasetError, match=r"03\.png"):
        trainer.start(Job(name="my ink", base="tiny-sd", trigger="sks"))
    trainer.write_captions("my ink", [["03.png", "a purple bird, in sks style"]])
    job = Job(name="my ink", base="tiny-sd", trigger="sks", steps=12, extra="state_every=1\nbatch_size=1")
    trainer.start(job)
    with pytest.raises(ConfigError, match="is going on"):
        trainer.start(job)
    waited(trainer, "my ink", steps=2)
    trainer.stop()
    assert waited(trainer, "my ink").startswith(("stopped after step", "finished"))
    trainer.start(job)
    assert waited(trainer, "my ink").startswith("finished: step 12 of 12")
    assert trainer.state("my ink").report
    assert trainer.publish("my ink") == "my ink.safetensors"
    assert "my ink" in [card.title for card in studio.cards("tiny-sd")]
    with pytest.raises(ConfigError, match="in the library already"):
        trainer.publish("my ink")


def test_a_run_that_fails_says_why_and_harms_nothing(studio: Studio) -> None:
    trainer = RunManager(studio)
    trainer.add_pictures("bad", sorted((sample_data_folder() / "styles" / "ink").glob("00.*")))
    trainer.start(Job(name="bad", base="tiny-sd", steps=2, extra="adapter.rank=-3"))
    assert "adapter.rank" in waited(trainer, "bad")
    for extra in ("output=/etc/x.safetensors", "data.cache_folder=/tmp", "optimizer.kind=os.system", "base=/etc"):
        with pytest.raises(ConfigError, match="not set from the studio"):
            trainer.command_words(Job(name="bad", base="tiny-sd", extra=extra))


def test_what_is_no_picture_is_not_taken(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "evil.png").write_text("<script>")
    with pytest.raises(ConfigError, match=r"evil\.png: is no picture"):
        RunManager(studio).add_pictures("x", [tmp_path / "evil.png"])
