"""The embedded base's training continues where it stopped, and its optimizer does what its paper says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train_scripts.tiny_base.architecture import LATENT_CHANNELS, new_vae
from train_scripts.tiny_base.latents import cache_latents, load_latents, random_styled_scene
from train_scripts.tiny_base.optimizer import Ema, orthogonalize
from train_scripts.tiny_base.unet_training import draw_batch, spread_timesteps, train_unet


@pytest.fixture(scope="module")
def latents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoencoder and twelve latents, as stages one and two leave them."""
    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    new_vae().save_pretrained(folder / "tiny-sd" / "vae")
    cache_latents(folder / "tiny-sd" / "vae", folder / "latents0.pt", count=12, seed=0)
    return folder


def test_cached_latents_keep_their_scenes(latents_folder: Path) -> None:
    latents, scenes = load_latents(latents_folder)
    rng = np.random.default_rng((3, 0))
    assert latents.shape == (12, LATENT_CHANNELS, 16, 16) and latents.dtype == torch.float16
    assert scenes == [random_styled_scene(rng) for _ in range(12)]


def test_a_step_always_draws_the_same_batch(latents_folder: Path) -> None:
    latents, scenes = load_latents(latents_folder)
    first, again, other = (draw_batch(latents, scenes, 6, step) for step in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert first[1] != other[1]


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(latents_folder: Path, tmp_path: Path) -> None:
    ends = []
    for name, stops in (("whole", [8]), ("stopped", [4, 8])):
        root = tmp_path / name
        (root / "tiny-sd" / "vae").mkdir(parents=True)
        for file in (latents_folder / "tiny-sd" / "vae").iterdir():
            (root / "tiny-sd" / "vae" / file.name).write_bytes(file.read_bytes())
        (root / "latents0.pt").write_bytes((latents_folder / "latents0.pt").read_bytes())
        for samples in stops:
            train_unet(root / "tiny-sd", samples=samples, batch=2, lr=1e-3, planned_samples=8)
        ends.append(torch.load(root / "tiny-sd" / "state.pt"))
    whole, stopped = ends
    assert whole["step"] == stopped["step"] == 4
    for name in ("unet", "text_encoder"):
        assert all(torch.equal(value, stopped[name][key]) for key, value in whole[name].items())
    assert all(torch.equal(a, b) for a, b in zip(whole["ema"], stopped["ema"], strict=True))


def test_newton_schulz_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_timesteps_are_spread_and_favor_the_middle() -> None:
    torch.manual_seed(0)
    t = torch.cat([spread_timesteps(100, 1000) for _ in range(20)])
    assert t.min() < 40 and t.max() > 960
    middle = ((t > 250) & (t < 750)).float().mean()
    assert 0.6 < middle < 0.8


def test_swapping_the_mean_twice_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema([parameter], 0.9)
    with torch.no_grad():
        parameter.add_(1)
    ema.update(0)
    live = parameter.detach().clone()
    ema.swap()
    assert not torch.equal(parameter, live)
    ema.swap()
    assert torch.equal(parameter, live)
