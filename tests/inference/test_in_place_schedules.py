"""Weight patches with schedules: each denoising step has exactly the blend of that step."""

import pytest
import torch
from diffusers import PNDMScheduler

from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.preset import BlendWeight, Schedule, Weight
from lora_diffusion.inference.composition import EncodePrompt
from lora_diffusion.inference.in_place import (
    weight_patch,
)
from lora_diffusion.inference.sampling import generate, sample
from lora_diffusion.models.load import Base
from tests.conftest import random_adapter
from tests.helpers.blends import blend_of, fresh, parameters, same


def fading() -> BlendWeight:
    return BlendWeight(value=0.9, schedule=Schedule(points=((0.0, 0.0), (0.5, 1.0), (1.0, -0.5)), curve="linear"))


@pytest.mark.usefixtures("before")
def test_a_schedule_gives_at_each_step_exactly_the_blend_of_that_step(sd: Base) -> None:
    scheduled, steady = random_adapter(sd, seed=1), random_adapter(sd, seed=2, unet=(), text_encoders=("attention",))
    blend, seen = blend_of((scheduled, fading()), (steady, 0.5)), []
    with weight_patch(sd) as patch:

        def look(denoising_step: DenoisingStep, _encode: EncodePrompt) -> None:
            patch.apply(blend, denoising_step)
            seen.append((denoising_step, parameters(sd)))

        sample(sd, GenerateConfig(prompt="a cat", steps=4, width=32, height=32), look)
    assert [denoising_step.index for denoising_step, _ in seen] == [0, 1, 2, 3]
    for denoising_step, live in seen:
        middle = (denoising_step.index + 0.5) / 4
        factor = 2 * middle if middle <= 0.5 else 1 - 3 * (middle - 0.5)
        plain = BlendWeight(value=0.9 * factor, components={"text_encoder": 0.9})
        expected = fresh(sd, blend_of((scheduled, plain), (steady, 0.5)))
        assert all(torch.allclose(live[name], value, atol=1e-6) for name, value in expected.items())
        assert same(live, fresh(sd, blend, denoising_step))


@pytest.mark.usefixtures("before")
def test_a_schedule_writes_only_where_and_when_it_changes(sd: Base) -> None:
    late = random_adapter(sd, seed=1, text_encoders=())
    steady = random_adapter(sd, seed=2, unet=(), text_encoders=("attention",))
    on_later = BlendWeight(schedule=Schedule(points=((0.0, 0.0), (0.5, 1.0))))
    blend = blend_of((late, on_later), (steady, 1.0))
    with weight_patch(sd) as patch:
        written = []
        for step in range(4):
            versions = {name: tensor._version for name, tensor in patch.live.items()}
            patch.apply(blend, DenoisingStep(index=step, total=4))
            written.append({name for name, tensor in patch.live.items() if tensor._version != versions.get(name)})
    assert [len(names) for names in written] == [len(steady.layers), 0, len(late.layers), 0]


def test_pictures_follow_the_schedule(sd: Base) -> None:
    adapter = random_adapter(sd, seed=1, text_encoders=())
    config = GenerateConfig(prompt="a cat", num_inference_steps=4, seed=3, width=32, height=32)

    def picture(weight: Weight) -> bytes:
        return generate(sd, [config], blend_of((adapter, weight)))[0].image.tobytes()

    def window(first: float, later: float) -> BlendWeight:
        return BlendWeight(schedule=Schedule(points=((0.0, first), (0.5, later))))

    assert picture(window(1, 1)) == picture(1.0)
    assert picture(window(0, 0)) == picture(0.0)
    assert len({picture(window(0, 1)), picture(window(1, 0)), picture(1.0), picture(0.0)}) == 4


def test_a_scheduler_with_more_calls_than_steps_reports_the_current_step(sd: Base) -> None:
    own = sd.pipe.scheduler
    sd.pipe.scheduler = PNDMScheduler(skip_prk_steps=True, num_train_timesteps=1000)
    seen: list[int] = []
    try:
        settings = GenerateConfig(prompt="a cat", num_inference_steps=10, width=32, height=32)
        sample(sd, settings, lambda denoising_step, _: seen.append(denoising_step.index))
    finally:
        sd.pipe.scheduler = own
    assert len(seen) == 11
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 9)
