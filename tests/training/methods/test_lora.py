"""LoRA and its variants: targets, ranks, scales, LoRA+, initialization, T-LoRA, VeRA and PiSSA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.adapters.adapter import AdapterMetadata
from lora_diffusion.adapters.blend import Blend, WeightedAdapter
from lora_diffusion.adapters.coefficients import DenoisingStep, block_factors
from lora_diffusion.adapters.layers import FullLayer, LoRALayer
from lora_diffusion.architectures.blocks import block_name
from lora_diffusion.architectures.module_paths import LAYOUTS, trainable_paths
from lora_diffusion.architectures.targets import resolve_targets
from lora_diffusion.cli import main
from lora_diffusion.errors import ConfigError
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter
from lora_diffusion.inference.in_place import weight_patch
from lora_diffusion.models.load import load_base, module_at
from lora_diffusion.training.methods.injection import extract_adapter, get_layer
from lora_diffusion.training.train import train
from tests.helpers.method_cases import config_of, injected, predicted, shake
from tests.helpers.short_runs import UNET_ONLY, settings


def test_only_the_target_modules_train(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    config = config_of("mixed", unet_target_modules=("attention",))
    paths, made = injected(base, config)
    learning = {name for name, parameter in base.pipe.unet.named_parameters() if parameter.requires_grad}
    assert {f"unet.{name}".replace(".update.", ".") for name in learning} == set(made.parameters)
    assert all(".attn" in path or ".norm1" in path or path == "unet.conv_in" for path in paths)
    adapter = extract_adapter(base, paths, AdapterMetadata(), torch.float32)
    assert isinstance(adapter.layers["unet.conv_in"], FullLayer)
    assert "unet.conv_in" in adapter.biases


def test_ranks_and_alphas_by_pattern(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, _ = injected(base, config_of("by block", alpha=2.0, alpha_pattern={"*.to_q": 8.0}))
    for path in paths:
        layer = get_layer(base, path).layer()
        rank = 1 if path.startswith("unet.down_blocks") else 6 if path.startswith("unet.mid_block") else 4
        assert layer.rank == rank
        assert layer.scale == pytest.approx((8.0 if path.endswith(".to_q") else 2.0) / rank)
    with pytest.raises(ConfigError, match=r"adapter.rank_pattern: '\*.nowhere' matches no trained module"):
        injected(load_base(str(sd_folder)), config_of("lora", rank_pattern={"*.nowhere": 2}))


def test_saved_layer_has_the_scale_of_rslora(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, _ = injected(base, config_of("rslora", rank=9))
    assert get_layer(base, paths[0]).layer().scale == pytest.approx(2 / 3)


def test_lora_fa_saves_no_input_for_the_backward_pass(sd_folder: Path) -> None:
    saved_counts: list[int] = []
    for method in ("lora", "lora-fa"):
        base = load_base(str(sd_folder))
        _, made = injected(base, config_of(method))
        total = 0

        def pack(values: Tensor) -> Tensor:
            nonlocal total
            total += 0 if isinstance(values, nn.Parameter) else values.numel()
            return values

        unet: Any = base.pipe.unet
        latents = torch.randn(1, unet.config.in_channels, 8, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            unet(latents, 5, encoder_hidden_states=torch.randn(1, 77, unet.config.cross_attention_dim))
        saved_counts.append(total)
        assert all(name.endswith(".down") is False for name in made.parameters) is (method == "lora-fa")
    assert saved_counts[1] < 0.9 * saved_counts[0]


def test_lora_plus_trains_up_faster(pictures: Path, sd_folder: Path) -> None:
    plain, plus = (
        train(settings(pictures, sd_folder, {"optimizer": {"loraplus_lr_ratio": rate}}, steps=1)).adapter
        for rate in (1.0, 8.0)
    )
    for path, layer in plain.layers.items():
        faster = plus.layers[path]
        assert isinstance(layer, LoRALayer)
        assert isinstance(faster, LoRALayer)
        assert torch.equal(layer.down, faster.down)
        assert float(faster.up.norm()) > 4 * float(layer.up.norm())
    for optimizer in ({"loraplus_lr_ratio": 4, "kind": "prodigy"}, {"loraplus_lr_ratio": 4, "rates": {"*.up": 2}}):
        with pytest.raises(ValueError, match="both determine"):
            settings(pictures, sd_folder, {"optimizer": optimizer})


def test_pissa_on_convolutions_is_rejected(pictures: Path, sd_folder: Path) -> None:
    changes = {
        "adapter": {
            "init_weights": "pissa",
            "unet_target_modules": ["convolutions"],
            "text_encoder_target_modules": ["attention"],
        }
    }
    with pytest.raises(ConfigError, match=r"adapter.init_weights 'pissa'.*convolution"):
        train(settings(pictures, sd_folder, changes))


@pytest.mark.parametrize(("part", "block"), [("content", "OUT00"), ("style", "OUT01")])
def test_b_lora_targets_match_the_block_preset_of_that_name(part: str, block: str) -> None:
    layout = LAYOUTS["sdxl"]
    paths = resolve_targets(trainable_paths(layout), unet=[f"b-lora-{part}"], text_encoders=())
    assert len(paths) == 10 * 8  # ten transformers, two attentions of four projections each
    assert {block_name(path, layout) for path in paths} == {block}
    factors = block_factors(f"BLORA-{part.upper()}", layout)
    assert [name for name, factor in factors.items() if factor] == [block]
    with pytest.raises(ConfigError, match="matches no module"):
        resolve_targets(trainable_paths(LAYOUTS["sd1"]), unet=[f"b-lora-{part}"], text_encoders=())
    with pytest.raises(ConfigError, match="unknown block preset"):
        block_factors(f"BLORA-{part.upper()}", LAYOUTS["sd1"])


def test_t_lora_samples_as_trained_and_cannot_be_merged(sd_folder: Path, tmp_path: Path) -> None:
    base, fresh = load_base(str(sd_folder)), load_base(str(sd_folder))
    paths, made = injected(base, config_of("t-lora", min_rank=2, rank=5))
    shake(made.parameters)
    base.pipe.unet.eval()
    metadata = AdapterMetadata(name="timed", family=base.family.name, min_rank=2)
    adapter = extract_adapter(base, paths, metadata, torch.float32)
    file = tmp_path / "timed.safetensors"
    save_adapter(adapter, file)
    adapter = load_adapter(file)
    assert adapter.metadata.min_rank == 2
    latents = torch.randn(1, base.pipe.unet.config.in_channels, 8, 8)
    hidden = torch.randn(1, 77, base.pipe.unet.config.cross_attention_dim)
    ranks: list[int] = []
    with weight_patch(fresh) as patch, torch.no_grad():
        for step in range(10):
            patch.apply(Blend(entries=(WeightedAdapter(adapter=adapter),)), DenoisingStep(index=step, total=10))
            ours = fresh.pipe.unet(latents, 1000 - 100 * step, encoder_hidden_states=hidden).sample
            theirs = base.pipe.unet(latents, 1000 - 100 * step, encoder_hidden_states=hidden).sample
            assert torch.allclose(ours, theirs, atol=1e-4)
            ranks.append(int(get_layer(base, paths[0]).active_directions.sum()))
    assert ranks[0] == 2
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 3
    for command in (
        ["merge", "--base", str(sd_folder), "--adapter", str(file), "--output", str(tmp_path / "m")],
        ["convert", str(file), str(tmp_path / "k.safetensors"), "--to", "kohya"],
        ["combine", f"{file}:0.5", str(tmp_path / "c.safetensors")],
    ):
        assert main(command) == 2
    assert main(["resize", str(file), str(tmp_path / "cut.safetensors"), "--first", "3"]) == 0
    cut = load_adapter(tmp_path / "cut.safetensors")
    assert cut.metadata.min_rank == 0
    assert {layer.rank for layer in cut.layers.values() if isinstance(layer, LoRALayer)} == {3}


def test_vera_trains_two_vectors_and_shares_the_factors(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("vera"))
    expected = sum(16 + module_at(base, path).weight.shape[0] for path in paths)
    assert sum(parameter.numel() for parameter in made.parameters.values()) == expected
    first, second = (get_layer(base, path) for path in paths[:2])
    width = min(first.shared_down[0].numel(), second.shared_down[0].numel())
    ours, theirs = (each.shared_down.flatten(1)[:, :width] for each in (first, second))
    assert torch.equal(ours, theirs)


def test_pissa_in_half_precision_rounds_relative_to_the_delta(sd_folder: Path) -> None:
    """The rounding error is relative to the delta, not to the principal part of the base weight."""
    base = load_base(str(sd_folder))
    paths, made = injected(base, config_of("pissa"))
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    exact, half = (extract_adapter(base, paths, AdapterMetadata(), dtype) for dtype in (torch.float32, torch.float16))
    for path, layer in exact.layers.items():
        assert isinstance(layer, LoRALayer)
        delta = layer.delta()
        assert float((half.layers[path].delta(torch.zeros_like(delta)) - delta).norm()) < 2e-3 * float(delta.norm())


def test_rank_dropout_of_pissa_drops_both_copies_of_a_direction(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    before = predicted(base)
    injected(base, config_of("pissa", rank_dropout=0.5))
    base.pipe.unet.train()
    assert torch.equal(predicted(base), before)


def test_orthogonal_rows_beyond_the_inputs_keep_their_noise(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    _, made = injected(base, config_of("orthogonal", unet_target_modules=("conv_in",), rank=64))
    down = made.parameters["unet.conv_in.down"].detach().flatten(1)
    assert down.shape[0] == 64 > down.shape[1]
    first = down[: down.shape[1]]
    assert torch.allclose(first @ first.T, torch.diag((first @ first.T).diagonal()), atol=1e-5)
    assert float(down[down.shape[1] :].norm(dim=1).min()) > 0
    predicted(base)


def test_t_lora_applies_dropout(sd_folder: Path) -> None:
    base = load_base(str(sd_folder))
    _, made = injected(base, config_of("t-lora", dropout=0.9))
    shake(made.parameters)
    base.pipe.unet.eval()
    assert torch.equal(predicted(base), predicted(base))
    base.pipe.unet.train()
    assert not torch.equal(predicted(base), predicted(base))


def test_t_lora_predicts_under_autocast(sd_folder: Path) -> None:
    """Normalization layers return float32 under autocast, so a layer's input has another dtype than its factors."""
    base = load_base(str(sd_folder))
    _, made = injected(base, config_of("t-lora"))
    shake(made.parameters)
    base.pipe.unet.eval()
    exact = predicted(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = predicted(base)
    assert torch.allclose(rounded.float(), exact, atol=0.1 * float(exact.abs().max()))


def test_lora_plus_without_up_factors_is_rejected(pictures: Path, sd_folder: Path) -> None:
    changes = {**UNET_ONLY, "optimizer": {"loraplus_lr_ratio": 4, "text_encoder_learning_rate": None}}
    changes["adapter"] = {**changes["adapter"], "kind": "loha"}
    with pytest.raises(ConfigError, match=r"optimizer.loraplus_lr_ratio is 4.0, but no trained layer has a factor"):
        train(settings(pictures, sd_folder, changes))
