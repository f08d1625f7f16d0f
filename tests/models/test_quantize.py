"""Training (QLoRA) and sampling on a quantized base."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.cli import main
from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.config.train import TrainConfig
from lora_diffusion.core.atomic_files import sample_data_folder
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.inference.in_place import is_quantized
from lora_diffusion.inference.sampling import generate
from lora_diffusion.library.recipe import read_recipe
from lora_diffusion.models.load import load_base
from lora_diffusion.models.quantize import is_quantizable, quantize_base
from lora_diffusion.training.log import LOG, read_log
from lora_diffusion.training.setup import set_up
from lora_diffusion.training.train import train
from tests.helpers.short_runs import loss_before, short_run

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning:bitsandbytes")


def make_config(ink: Path, tmp_path: Path, quantization: str = "nf4", **changes: Any) -> TrainConfig:
    return short_run(ink, tmp_path / "it.safetensors", 12, {"compute": {"quantize": quantization}, **changes})


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_an_adapter_trained_on_a_quantized_base_works_on_the_plain_base(
    quantization: str, ink: Path, tmp_path: Path
) -> None:
    config = make_config(ink, tmp_path, quantization)
    assert is_quantized(set_up(config).base)
    before = loss_before(config)
    result = train(config)
    assert read_log(tmp_path / "it-run" / LOG)[-1]["validation"]["loss"] < 0.97 * before
    adapter = load_adapter(result.path)
    prompt = GenerateConfig(prompt="a house in the snow, in sks style", num_inference_steps=3)
    base = load_base()
    plain, styled = (
        generate(base, [prompt], blend)[0].image.tobytes()
        for blend in (Blend(), Blend(entries=(WeightedAdapter(adapter=adapter),)))
    )
    assert plain != styled


@needs_bitsandbytes
@pytest.mark.parametrize(("quantization", "max_error"), [("nf4", 0.2), ("fp4", 0.25), ("int8", 0.02)])
def test_quantized_weights_are_smaller_and_change_the_output_little(quantization: Any, max_error: float) -> None:
    base = load_base()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, base.pipe.unet.config.in_channels, 16, 16, generator=generator)
    hidden = torch.randn(1, 77, base.pipe.unet.config.cross_attention_dim, generator=generator)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return base.pipe.unet(noise, 500, encoder_hidden_states=hidden).sample

    before, linears = predict(), [m for m in base.pipe.unet.modules() if type(m) is nn.Linear and is_quantizable(m)]
    half_precision_bytes = sum(module.weight.numel() * 2 for module in linears)
    assert quantize_base(base, quantization, base.device).quantization == quantization
    error = float((predict() - before).norm() / before.norm())
    assert 0 < error < max_error
    quantized = [
        m for m in base.pipe.unet.modules() if isinstance(m, nn.Linear) and not m.weight.dtype.is_floating_point
    ]
    share = sum(module.weight.numel() * module.weight.element_size() for module in quantized) / half_precision_bytes
    assert share == pytest.approx(0.5 if quantization == "int8" else 0.25, abs=0.01)


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ({"use_dora": True}, "adapter.use_dora"),
        ({"kind": "loha"}, "adapter.kind 'loha'"),
        ({"init_weights": "pissa"}, "adapter.init_weights 'pissa'"),
        ({"modules_to_save": ["unet.conv_in"]}, "adapter.modules_to_save"),
    ],
)
def test_a_method_that_needs_unquantized_weights_is_refused(
    adapter: dict[str, Any], named: str, ink: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(ink, tmp_path, adapter=adapter)
    assert f"compute.quantize 'nf4' quantizes the base's weights, and {named} needs them unquantized" in str(
        caught.value
    )


@needs_bitsandbytes
def test_images_of_a_quantized_base_are_reproduced_from_their_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neon = sample_data_folder() / "adapters" / "neon.safetensors"
    asked = ["generate", "--prompt", "a red house, in zwx style", "--steps", "4", "--output", str(tmp_path)]
    assert main([*asked, "--adapter", str(neon)]) == 0
    assert main([*asked, "--adapter", str(neon), "--quantize", "nf4"]) == 0
    assert main([*asked, "--quantize", "nf4"]) == 0
    plain, quantized, bare = (tmp_path / f"0000{i}.png" for i in range(3))
    assert [read_recipe(path).quantization for path in (plain, quantized, bare)] == ["none", "nf4", "nf4"]
    assert 0 < difference(plain, quantized) < 0.25 * difference(quantized, bare)
    assert main(["generate", "--from", str(quantized), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "00003.png").read_bytes() == quantized.read_bytes()
    capsys.readouterr()
    assert main(["generate", "--from", str(plain), "--quantize", "nf4", "--output", str(tmp_path)]) == 2
    assert "--from repeats an image with its own settings" in capsys.readouterr().err


def difference(first: Path, second: Path) -> float:
    """Return the mean absolute difference of two images."""
    one, other = (np.asarray(Image.open(path), dtype=float) for path in (first, second))
    return float(np.abs(one - other).mean())


@needs_bitsandbytes
def test_a_base_without_quantizable_layers_is_refused(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    for module in base.pipe.unet.modules():
        if isinstance(module, nn.Linear):
            module.in_features = 33
    with pytest.raises(ConfigError, match="no linear layer"):
        quantize_base(base, "nf4", base.device)


def test_missing_bitsandbytes_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("lora_diffusion.models.quantize.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-diffusion\[quantized\]'"):
        quantize_base(load_base(), "nf4", torch.device("cpu"))
