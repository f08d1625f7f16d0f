"""Weights by component, block, module pattern and denoising step, and their text form in tags."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.adapters.coefficients import (
    DenoisingStep,
    block_factors,
    coefficients,
    expand_block_preset,
    read_block_presets,
    schedule_factor,
    stock_presets,
)
from lora_diffusion.architectures.blocks import block_name, vector_block_names
from lora_diffusion.architectures.module_paths import LAYOUTS, module_paths
from lora_diffusion.config.preset import BlendWeight, Schedule
from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.tags import Tag, extract_tags, format_weight, parse_weight

SD1, SDXL = LAYOUTS["sd1"], LAYOUTS["sdxl"]
STOCK_SD1 = {
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": ",".join(["0.5"] * 17),
    "NONE": ",".join("0" * 17),
    "ALL": ",".join("1" * 17),
}
"""Stock presets of sd-webui-lora-block-weight, copied."""
STEPS = st.integers(1, 60).flatmap(lambda steps: st.tuples(st.integers(0, steps - 1), st.just(steps)))


def at(weight: object, path: str, denoising_step: DenoisingStep | None = None, layout: object = SD1) -> float:
    return coefficients(weight, [path], layout, denoising_step)[path]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STOCK_SD1)
def test_stock_presets_equal_those_of_sd_webui_lora_block_weight(name: str) -> None:
    vector = tuple(float(value) for value in STOCK_SD1[name].split(","))
    assert tuple(stock_presets(SD1)[name].values()) == vector
    assert block_factors(name, SD1) == block_factors(vector, SD1)


@pytest.mark.parametrize(
    ("family", "lengths", "modules"),
    [
        ("sd1", (26, 17), {"IN01": 12, "IN08": 12, "M00": 12, "OUT03": 12, "OUT11": 12, "IN03": 0, "OUT00": 0}),
        ("sdxl", (20, 12), {"IN04": 22, "IN07": 102, "M00": 102, "OUT00": 102, "OUT03": 22, "IN01": 0, "OUT06": 0}),
    ],
)
def test_blocks_contain_as_many_modules_as_in_other_tools(
    family: str, lengths: tuple[int, int], modules: dict[str, int]
) -> None:
    shape = LAYOUTS[family]
    assert tuple(map(len, vector_block_names(shape))) == lengths
    attention = [p for p in module_paths(shape) if ".attentions." in p]
    for block, count in modules.items():
        assert sum(block_name(path, shape) == block for path in attention) == count


def test_block_names_of_resamplers_and_embeddings_follow_the_original_checkpoints() -> None:
    places = {
        "unet.conv_in": "IN00",
        "unet.down_blocks.0.downsamplers.0.conv": "IN03",
        "unet.down_blocks.3.resnets.1.conv1": "IN11",
        "unet.mid_block.resnets.1.conv2": "M00",
        "unet.up_blocks.0.upsamplers.0.conv": "OUT02",
        "unet.up_blocks.3.attentions.2.proj_in": "OUT11",
        "unet.time_embedding.linear_1": "",
        "unet.conv_out": "",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "BASE",
    }
    assert {path: block_name(path, SD1) for path in places} == places


def test_modules_outside_a_block_vector_keep_the_adapters_weight() -> None:
    weight = BlendWeight(value=0.8, blocks=tuple([0.0] * 17))
    assert at(weight, "unet.down_blocks.0.attentions.0.proj_in") == 0.0
    assert at(weight, "unet.down_blocks.0.downsamplers.0.conv") == 0.8
    assert at(weight, "unet.time_embedding.linear_1") == 0.8


@pytest.mark.parametrize(("shape", "wrong"), [(SD1, 12), (SD1, 20), (SDXL, 17), (SDXL, 26), (SD1, 5)])
def test_a_block_vector_of_another_family_raises(shape: object, wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"block vector of {wrong} values does not fit"):
        block_factors(tuple([1.0] * wrong), shape)  # type: ignore[arg-type]


def test_an_unknown_preset_or_block_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'MIDD'"):
        block_factors("MIDDD", SD1)
    with pytest.raises(ConfigError, match="did you mean OUT11"):
        block_factors({"OUT111": 1.0}, SD1)


def test_components_blocks_and_patterns_multiply() -> None:
    weight = BlendWeight(
        value=2.0,
        components={"text_encoder": 0.5},
        blocks={"BASE": 0.5, "M00": 0.25},
        modules=(("unet.*", 3.0), ("*.attn2.*", -1.0)),
    )
    middle = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert at(weight, f"{middle}.attn1.to_q") == 2.0 * 0.25 * 3.0
    assert at(weight, f"{middle}.attn2.to_q") == 2.0 * 0.25 * -1.0
    assert at(weight, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj") == 0.25


def test_an_lbwpresets_file_is_parsed(tmp_path: Path) -> None:
    file = tmp_path / "lbwpresets.txt"
    flux = ",".join("1" * 61)
    file.write_text(f"# mine\nEYES:{','.join('1' * 17)}\nEYES:{','.join('0' * 12)}\nFLUXALL:{flux}\n\nOFF:1,2 # no\n")
    presets = read_block_presets(file)
    assert {name: [len(v) for v in vectors] for name, vectors in presets.items()} == {"EYES": [17, 12]}
    assert set(block_factors("EYES", SD1, presets).values()) == {1.0}
    assert set(block_factors("EYES", SDXL, presets).values()) == {0.0}
    spelled = expand_block_preset(BlendWeight(blocks="EYES"), SDXL, presets)
    assert isinstance(spelled, BlendWeight) and dict(spelled.blocks)["IN04"] == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ["MIDD:1,2,3", "no colon here", f"R:{','.join('R' * 17)}"])
def test_an_invalid_preset_line_is_reported_by_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.txt").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_block_presets(tmp_path / "p.txt")


@given(STEPS, st.floats(0, 1), st.floats(0, 1))
def test_start_and_stop_enable_the_steps_whose_midpoint_lies_between(step: tuple[int, int], a: float, b: float) -> None:
    start, stop = sorted((round(a, 3), round(b, 3)))
    weight = parse_weight(["1", f"start={start:.3f}", f"stop={stop:.3f}"], source="x")
    assert isinstance(weight, BlendWeight) and weight.schedule
    denoising_step = DenoisingStep(index=step[0], total=step[1])
    middle = (step[0] + 0.5) / step[1]
    assert schedule_factor(weight.schedule, denoising_step) == float(start <= middle < stop)


@given(STEPS, st.integers(0, 60), st.integers(0, 60))
def test_integers_are_step_indices(step: tuple[int, int], a: int, b: int) -> None:
    start, stop = sorted((a, b))
    weight = parse_weight([f"step={start}-{stop}"], source="x")
    assert isinstance(weight, BlendWeight) and weight.schedule
    assert schedule_factor(weight.schedule, DenoisingStep(index=step[0], total=step[1])) == float(
        start <= step[0] < stop
    )


def test_curves_interpolate_between_their_points() -> None:
    for curve, quarter in (("linear", 0.25), ("cosine", (1 - math.cos(math.pi / 4)) / 2), ("hold", 0.0)):
        schedule = Schedule(points=((0, 0.0), (8, 1.0)), unit="step", curve=curve)  # type: ignore[arg-type]
        values = [schedule_factor(schedule, DenoisingStep(index=step, total=20)) for step in (0, 2, 8, 15)]
        assert values == pytest.approx([0.0, quarter, 1.0, 1.0])


def test_a_schedule_does_not_apply_to_text_encoders_and_needs_a_step() -> None:
    weight = BlendWeight(schedule=Schedule(points=((0.0, 0.0),)))
    denoising_step = DenoisingStep(index=0, total=4)
    assert at(weight, "unet.conv_in", denoising_step) == 0.0
    assert at(weight, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", denoising_step) == 1.0
    with pytest.raises(ConfigError, match="schedule over denoising steps can only be applied while sampling"):
        at(weight, "unet.conv_in")


def test_a_block_may_have_its_own_schedule() -> None:
    late = Schedule(points=((0.0, 0.0), (0.5, 1.0)))
    weight = BlendWeight(blocks={"M00": late})
    values = [at(weight, "unet.mid_block.attentions.0.proj_in", DenoisingStep(index=s, total=4)) for s in range(4)]
    assert values == [0.0, 0.0, 1.0, 1.0]
    assert at(weight, "unet.conv_in", DenoisingStep(index=0, total=4)) == 1.0


def test_tags_are_removed_from_the_prompt() -> None:
    prompt, tags = extract_tags("a cat <lora:neon:0.8>, at night <lora:gloop:0.7:0.2:lbw=MIDD:start=0.2:stop=0.8>")
    assert prompt == "a cat, at night"
    assert tags[0] == Tag(name="neon", weight=0.8)
    weight = tags[1].weight
    assert isinstance(weight, BlendWeight)
    assert (weight.value, weight.components["text_encoder"], weight.blocks) == (0.7, 0.2, "MIDD")
    assert extract_tags("no tags,  two spaces") == ("no tags,  two spaces", ())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:x:strong>", "'strong' is not a finite number"),
        ("<lora:x:1:lbv=MIDD>", "unknown option 'lbv'"),
        ("<lora::1>", "has no name"),
        ("<lora:x:1", "not closed"),
        ("<lora:x:1:start=0.5:linear=0@0.1,1@0.2>", "more than one schedule"),
        ("<lora:x:start=0.5:stop=10>", "mixes fractions and steps"),
        ("<lora:x:start=1.5>", "at most 1.0"),
        ("<lora:x:start=0.8:stop=0.2>", "not in ascending order"),
        ("<lora:x:lbw=MIDD:IN04=1>", "both lbw= and factors for single blocks"),
        ("<lora:x:lbw=1,R,0>", "'R' is not a number"),
        ("<lora:x:1:2:3:4>", "up to three numbers"),
        ("<lora:x:te=1:te=2>", "same option twice"),
        ("<lora:x:linear=0,1>", "not a list of factor@position"),
    ],
)
def test_a_malformed_tag_raises_with_the_reason(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extract_tags(f"a cat {prompt}")


numbers = st.floats(-4, 4).map(lambda x: round(x, 2) + 0.0)


@st.composite
def weight_texts(draw: st.DrawFn) -> str:
    parts = [f"{draw(numbers):g}"]
    parts += [f"te={draw(numbers):g}"] * draw(st.integers(0, 1))
    parts += draw(st.sampled_from([[], ["lbw=MIDD"], ["IN04=0.5", "M00=0"], [f"lbw={STOCK_SD1['INS']}"]]))
    parts += draw(st.sampled_from([[], ["*.attn2.*=0.5"]]))
    parts += draw(st.sampled_from([[], ["start=0.2"], ["stop=12"], ["cosine=0@0.25,1@0.75"], ["step=3-7"]]))
    return ":".join(parts)


@given(weight_texts())
def test_a_formatted_weight_parses_back(text: str) -> None:
    weight = parse_weight(text.split(":"), source="x")
    assert parse_weight(format_weight(weight).split(":"), source="x") == weight
    if isinstance(weight, BlendWeight):
        assert BlendWeight.model_validate_json(weight.model_dump_json()) == weight
