"""Variations: noise interpolated between two seeds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.initial_noise import slerp_columns, variation_noise
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import load_base
from lora_diffusion.prompts.image_metadata import read_infotext
from lora_diffusion.prompts.infotext import convert_settings, parse_infotext

SHAPE = (1, 4, 32, 32)


def noise(seed: int, share: float, other: int) -> torch.Tensor:
    return variation_noise(SHAPE, torch.Generator("cpu").manual_seed(seed), other, share, torch.float32)


@given(share=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_a_variation_is_noise_of_the_same_strength(share: float, seed: int) -> None:
    assert abs(float(noise(seed, share, seed + 1).std()) - 1) < 0.08


def test_the_ends_are_the_two_seeds_own() -> None:
    first, second = (torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(seed)) for seed in (3, 4))
    assert torch.equal(noise(3, 1.0, 4), second)
    assert torch.allclose(noise(3, 0.0, 4), first, atol=1e-6)


def test_equal_and_opposite_directions_give_finite_noise() -> None:
    start = torch.randn(SHAPE)
    for end in (start, -start, start * 2):
        assert torch.isfinite(slerp_columns(start, end, 0.3)).all()


def picture(**settings: object) -> np.ndarray:
    config = validate(GenerateConfig, {"prompt": "a red house", "steps": 4, **settings}, source="test")
    return np.asarray(generate(load_base(), [config])[0].image, dtype=float)


@pytest.mark.parametrize("scheduler", ["base", "ddim"])
def test_a_picture_moves_from_one_seed_to_another(scheduler: str) -> None:
    own, other = picture(seed=1, scheduler=scheduler), picture(seed=2, scheduler=scheduler)
    moved = [picture(seed=1, variation=share, variation_seed=2, scheduler=scheduler) for share in (0.1, 0.6, 1.0)]
    away = [np.abs(each - own).mean() for each in moved]
    assert 0 < away[0] < away[1]
    assert np.array_equal(moved[2], other)


def test_further_pictures_are_further_variations_and_each_is_made_again(tmp_path: Path) -> None:
    config = GenerateConfig(
        prompt="a red house", num_inference_steps=2, seed=5, variation=0.3, variation_seed=7, count=2
    )
    made = generate(load_base(), [config])
    settings = [each.recipe.settings for each in made]
    assert [(each.seed, each.variation_seed) for each in settings if each] == [(5, 7), (5, 8)]
    made[1].save(tmp_path / "a.png")
    info = read_infotext(tmp_path / "a.png")
    assert info
    table, _ = convert_settings(info, source="a.png")
    assert (table["variation"], table["variation_seed"]) == (0.3, 8)
    again = generate(load_base(), [s for s in settings if s][1:])[0]
    assert again.image.tobytes() == made[1].image.tobytes()


def test_a_strength_of_0_is_no_variation() -> None:
    line = (
        "a\nSteps: 2, Sampler: euler, CFG scale: 4, Seed: 1, Size: 64x64, Variation seed: 9, Variation seed strength: "
    )
    table, notes = convert_settings(parse_infotext(f"{line}0.0", source="it"), source="it")
    assert "variation_seed" not in table
    assert not any("ariation" in note for note in notes)
    with pytest.raises(ConfigError, match="Variation seed strength"):
        convert_settings(parse_infotext(f"{line}2", source="it"), source="it")


def test_a_variation_seed_without_strength_is_refused() -> None:
    with pytest.raises(ConfigError, match="variation_seed has no effect"):
        validate(GenerateConfig, {"prompt": "a", "variation_seed": 3}, source="test")
