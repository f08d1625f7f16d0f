"""Merging the blend."""

import re
import shlex
from pathlib import Path

import pytest

from lora_diffusion.cli import main
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion_studio.backend.checkpoint_merge import (
    MergeDone,
    MergeTarget,
    WriteProgress,
    format_merge_command,
    run_merge,
    summarize_merge,
)
from lora_diffusion_studio.backend.studio import Studio
from lora_diffusion_studio.view_models.adapter_slot import AdapterSlot
from lora_diffusion_studio.view_models.blend_form import BlendForm

PROMPT = {"prompt": "a red house, in zwx style", "num_inference_steps": 2, "width": 32, "height": 32}
BOTH = (AdapterSlot(name="neon.safetensors", weight=0.6), AdapterSlot(name="gloop.safetensors", weight=0.8))
FORM = BlendForm(slots=BOTH, settings=PROMPT)


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_merge_equals_that_of_the_command_line(studio: Studio, kind: str, tmp_path: Path) -> None:
    target = MergeTarget(name="both", kind=kind)
    assert "neon (weight 0.6), gloop (weight 0.8)" in summarize_merge(studio, FORM, target)
    written = list(run_merge(studio, FORM, target))[-1]
    assert isinstance(written, MergeDone)
    words = shlex.split(format_merge_command(studio, FORM, target))[1:]
    expected = tmp_path / written.path.name
    assert main([str(expected) if word.endswith(written.path.name) else word for word in words]) == 0
    files = (
        [(written.path, expected)]
        if kind == "adapter"
        else [(path, expected / path.relative_to(written.path)) for path in written.path.rglob("*.safetensors")]
    )
    assert files
    if kind == "adapter":
        assert load_adapter(written.path).hash == load_adapter(expected).hash
    else:
        assert all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in files)
    with pytest.raises(ConfigError, match="already exists"):
        summarize_merge(studio, FORM, target)


def test_merge_reports_progress_and_can_be_stopped(studio: Studio) -> None:
    target = MergeTarget(name="both", kind="file", precision="float16")
    stream = run_merge(studio, FORM, target)
    while not (isinstance(event := next(stream), WriteProgress) and event.fraction > 0.2):
        pass
    stream.close()
    assert not any((studio.config.output / "merged").iterdir())
    events = list(run_merge(studio, FORM, target))
    fractions = [event.fraction for event in events if isinstance(event, WriteProgress)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert isinstance(events[-1], MergeDone)


@pytest.mark.parametrize("precision", ["keep", "float16", "bfloat16"])
def test_summary_predicts_the_rounding_error(studio: Studio, precision: str) -> None:
    target = MergeTarget(name="both", precision=precision)
    predicted = float(re.findall(r"expected rounding error ([\d.]+)%", summarize_merge(studio, FORM, target))[0])
    done = list(run_merge(studio, FORM, target))[-1]
    assert isinstance(done, MergeDone)
    measured = float(re.findall(r"rounding error ([\d.]+)%", done.text)[0])
    assert abs(predicted - measured) <= 0.25 * measured


def test_blends_that_cannot_be_merged_are_refused(studio: Studio) -> None:
    for form, message in (
        (BlendForm(slots=BOTH, mode="composite", settings=PROMPT), "cannot be merged into weights"),
        (BlendForm(settings=PROMPT), "the blend has no enabled adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            summarize_merge(studio, form, MergeTarget(name="x"))
    with pytest.raises(ConfigError, match="is not a valid name"):
        summarize_merge(studio, FORM, MergeTarget(name="../../x"))
