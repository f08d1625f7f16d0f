"""QLoRA: an adapter trained on a base in codes."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_diffusion.blend import Blend, WeightedAdapter
from lora_diffusion.config import GenerateConfig, validate
from lora_diffusion.errors import ConfigError
from lora_diffusion.files import sample_data
from lora_diffusion.formats.reading import load_adapter
from lora_diffusion.models import load_base
from lora_diffusion.patching import quantised
from lora_diffusion.sampling import generate
from lora_diffusion.train_config import TrainConfig
from lora_diffusion.training.loop import train
from lora_diffusion.training.quantising import fits, quantise
from lora_diffusion.training.run_log import LOG, read_log
from lora_diffusion.training.run_setup import set_up
from lora_diffusion.training.validation import validated

needs_codes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning:bitsandbytes")


def config_of(tmp_path: Path, **changes: Any) -> TrainConfig:
    pictures = tmp_path / "ink"
    pictures.mkdir(exist_ok=True)
    for file in sorted((sample_data() / "styles" / "ink").glob("0[0-3].*")):
        shutil.copy(file, pictures)
    table: dict[str, Any] = {
        "data": {"folder": pictures},
        "output": tmp_path / "it.safetensors",
        "steps": 20,
        "batch_size": 2,
        "adapter": {"rank": 4},
        "compute": {"quantise": "nf4"},
        "optimiser": {"learning_rate": 5e-3, "warmup_steps": 1, "schedule": "constant"},
        "validation": {"folder": pictures, "every": 20, "draws": 4},
        "tracking": {"trackers": []},
    }
    return validate(TrainConfig, {**table, **changes}, source="test")


@needs_codes
@pytest.mark.parametrize("codes", ["nf4", "fp4", "int8"])
def test_an_adapter_learns_on_a_base_in_codes_and_fits_the_plain_one(codes: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, compute={"quantise": codes})
    run = set_up(config)
    assert quantised(run.base)
    assert run.held_out
    before = validated(run.base, run.denoiser, run.captions, run.held_out, config).loss
    result = train(config)
    assert read_log(run.folder / LOG)[-1]["validation"]["loss"] < 0.97 * before
    adapter = load_adapter(result.path)
    prompt = GenerateConfig(prompt="a house in the snow, in sks style", steps=3)
    base = load_base()
    plain, styled = (
        generate(base, [prompt], blend)[0].image.tobytes()
        for blend in (Blend(), Blend(entries=(WeightedAdapter(adapter=adapter),)))
    )
    assert plain != styled


@needs_codes
@pytest.mark.parametrize(("codes", "most"), [("nf4", 0.2), ("fp4", 0.25), ("int8", 0.02)])
def test_codes_say_nearly_what_the_weights_said_in_a_part_of_the_bytes(codes: Any, most: float) -> None:
    base = load_base()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, base.pipe.unet.config.in_channels, 16, 16, generator=generator)
    hidden = torch.randn(1, 77, base.pipe.unet.config.cross_attention_dim, generator=generator)

    def said() -> torch.Tensor:
        with torch.no_grad():
            return base.pipe.unet(noise, 500, encoder_hidden_states=hidden).sample

    before, linear = said(), [m for m in base.pipe.unet.modules() if type(m) is nn.Linear and fits(m)]
    whole = sum(module.weight.numel() * 2 for module in linear)
    assert quantise(base, codes) == len(linear)
    error = float((said() - before).norm() / before.norm())
    assert 0 < error < most
    coded = [m for m in base.pipe.unet.modules() if isinstance(m, nn.Linear) and not m.weight.dtype.is_floating_point]
    share = sum(module.weight.numel() * module.weight.element_size() for module in coded) / whole
    assert share == pytest.approx(0.5 if codes == "int8" else 0.25, abs=0.01)


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ({"dora": True}, "adapter.dora"),
        ({"kind": "loha"}, "adapter.kind 'loha'"),
        ({"start": "pissa"}, "adapter.start 'pissa'"),
        ({"full_targets": ["unet.conv_in"]}, "adapter.full_targets"),
    ],
)
def test_a_method_that_needs_whole_weights_is_refused(adapter: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, adapter=adapter)
    assert f"compute.quantise 'nf4' keeps weights in codes, and {named} needs them in full" in str(caught.value)


@needs_codes
def test_a_base_that_cannot_be_held_in_codes_is_refused(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    for module in base.pipe.unet.modules():
        if isinstance(module, nn.Linear):
            module.in_features = 33
    with pytest.raises(ConfigError, match="no linear layer"):
        quantise(base, "nf4")


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("lora_diffusion.training.quantising.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-diffusion\[quantised\]'"):
        quantise(load_base(), "nf4")
