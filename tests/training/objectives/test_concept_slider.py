"""Concept sliders: training, the loss and settings that are rejected."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_diffusion.adapters.adapter import Adapter
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.settings import validate
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.inference.sampling import generate
from lora_diffusion.models.load import Base
from lora_diffusion.training.methods.injection import adapter_disabled, get_layer
from lora_diffusion.training.objectives.concept_slider import adapter_weight
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from tests.helpers.short_runs import UNET_ONLY, settings

NIGHT = {"positive": "a house at night", "negative": "a house at noon", "target": "a house", "strength": 1.0}


def brightness(base: Base, adapter: Adapter, weight: float) -> float:
    """Compute the mean pixel value of three pictures."""
    configs = [GenerateConfig(prompt="a red house", seed=seed, steps=8) for seed in (1, 2, 3)]
    made = generate(base, configs, Blend(entries=(WeightedAdapter(adapter=adapter, weight=weight),)))
    return float(np.mean([np.asarray(picture.image, dtype=float) for picture in made]))


def test_slider_darkens_with_positive_weight_and_brightens_with_negative(tmp_path: Path, tiny: Base) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for file in sorted((sample_data_folder() / "styles" / "watercolour").glob("0[0-5].*")):
        shutil.copy(file, pictures)
    table = {
        "data": {"folder": pictures},
        "output": tmp_path / "night.safetensors",
        "steps": 60,
        "batch_size": 2,
        "adapter": {"rank": 4},
        "slider": NIGHT,
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1},
        "tracking": {"trackers": []},
    }
    result = train(validate(TrainConfig, table, source="test"))
    assert result.last_loss < 0.8 * result.first_loss
    assert result.adapter.metadata.training["slider"] == NIGHT
    dark, plain, light = (brightness(tiny, result.adapter, weight) for weight in (1.0, 0.0, -1.0))
    assert dark < plain - 5
    assert plain < light


def test_initial_loss_is_the_squared_direction(pictures: Path, sd_folder: Path) -> None:
    """Before the first step, the error of both signs is the difference between the two prompts."""
    config = settings(pictures, sd_folder, {**UNET_ONLY, "slider": {**NIGHT, "strength": 2.0}})
    run = set_up(config)
    latent = torch.randn(2, 4, 8, 8)
    noise, timestep, ids = torch.randn(2, 4, 8, 8), torch.tensor([100, 600]), torch.zeros(2, 6)
    slider_loss: Any = run.denoiser.replacement_loss
    with torch.no_grad():
        loss = slider_loss.compute_losses(run.denoiser, latent, noise, timestep, ids)
        with adapter_disabled(run.base):
            ends = [
                run.denoiser.predict(latent, noise, timestep, slider_loss.context(text, latent, ids))
                for text in (NIGHT["positive"], NIGHT["negative"])
            ]
    expected = (2.0 * (ends[0] - ends[1])).square().mean(dim=(1, 2, 3))
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_adapter_weight_applies_inside_the_context_only(pictures: Path, sd_folder: Path) -> None:
    run = set_up(
        settings(pictures, sd_folder, {**UNET_ONLY, "adapter": {"alpha": 3.0, "text_encoder_target_modules": []}})
    )
    update = get_layer(run.base, run.paths[0])
    with adapter_weight(run.base, -1.0):
        assert update.current_scale == -1.5
    assert update.current_scale == 1.5


def test_gradient_checkpointing_does_not_change_the_gradients(pictures: Path, sd_folder: Path) -> None:
    """The forward pass of the first sign is recomputed after the weight has changed to that of the second."""
    found: list[list[torch.Tensor]] = []
    for checkpointing in (False, True):
        changes = {**UNET_ONLY, "slider": NIGHT, "compute": {"gradient_checkpointing": checkpointing}}
        run = set_up(settings(pictures, sd_folder, changes))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in run.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        latent, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
        slider_loss: Any = run.denoiser.replacement_loss
        run.denoiser.train()
        loss = slider_loss.compute_losses(
            run.denoiser, latent, noise, torch.tensor([100, 600]), torch.zeros(2, 6)
        ).mean()
        found.append([*torch.autograd.grad(loss, [*run.parameters.values()])])
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slider": {**NIGHT, "negative": NIGHT["positive"]}}, "are the same prompt"),
        ({"slider": {"negative": "a"}}, "have no effect without positive"),
        (
            {"slider": NIGHT, "textual_inversion": {"placeholder_tokens": ["sks"]}},
            "slider cannot be combined with trained text encoders or tokens",
        ),
        ({"slider": NIGHT, "adapter": {"use_dora": True, "text_encoder_target_modules": []}}, "adapter.kind to lora"),
        ({"slider": NIGHT, "prior": {"mode": "prediction"}}, "slider and prior"),
        ({"slider": NIGHT, "objective": {"loss": "huber"}}, "does not support objective.loss"),
    ],
)
def test_invalid_slider_settings_are_rejected(
    changes: dict[str, Any], message: str, pictures: Path, sd_folder: Path
) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        settings(pictures, sd_folder, {**UNET_ONLY, **changes})
    assert message in str(caught.value)
