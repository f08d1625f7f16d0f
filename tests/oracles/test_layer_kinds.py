"""Every layer kind against the reference implementation: LyCORIS for kohya files, PEFT for its own."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_diffusion.adapters.layers import DoRALayer
from lora_diffusion.formats.adapters.kohya_keys import kohya_name
from lora_diffusion.formats.adapters.load import load_adapter
from lora_diffusion.formats.adapters.native import save_adapter

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"
LYCORIS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "locon": (LoConModule, {"lora_dim": 4, "alpha": 2.0}),
    "locon-tucker": (LoConModule, {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    "locon-rs": (LoConModule, {"lora_dim": 5, "alpha": 2.0, "rs_lora": True}),
    "dora": (LoConModule, {"lora_dim": 4, "alpha": 2.0, "weight_decompose": True}),
    "dora-in": (LoConModule, {"lora_dim": 4, "alpha": 2.0, "weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {"lora_dim": 3, "alpha": 1.5}),
    "loha-tucker": (LohaModule, {"lora_dim": 3, "alpha": 1.5, "use_tucker": True}),
    "loha-dora": (LohaModule, {"lora_dim": 3, "alpha": 1.5, "weight_decompose": True}),
    "lokr": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "factor": 8}),
    "lokr-both": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "factor": 8, "decompose_both": True}),
    "lokr-tucker": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "factor": 4, "use_tucker": True}),
    "lokr-full": (LokrModule, {"lora_dim": 10000, "alpha": 7.0, "factor": 8, "full_matrix": True}),
    "lokr-dora": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "factor": 8, "weight_decompose": True}),
    "full": (FullModule, {}),
}


def random_module(path: str) -> nn.Module:
    """Create a module of the shape that the embedded base has at that path, with fixed random weights."""
    torch.manual_seed(3)
    return nn.Linear(48, 48, bias=True) if path == LINEAR else nn.Conv2d(48, 48, 3, padding=1)


def random_state(module: Any) -> dict[str, Tensor]:
    """Return the state dict that the module saves, with random changes so that no factor is zero."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "dora_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    saved = module.custom_state_dict() or module.state_dict()
    return {key: value.detach().clone().contiguous() for key, value in saved.items()}


@pytest.mark.parametrize("path", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_a_lycoris_file_has_the_forward_pass_of_lycoris(kind: str, path: str, tmp_path: Path) -> None:
    """The forward pass is compared because merging in LyCORIS applies the scale of LoHa and LoKr twice."""
    build, options = LYCORIS[kind]
    module = build("lora_unet_x", random_module(path), **options)
    module.apply_to()
    file = tmp_path / "lycoris.safetensors"
    name = kohya_name(path, "tiny-sd")
    save_file({f"{name}.{key}": value for key, value in random_state(module).items()}, file)
    adapter = load_adapter(file)
    ours: Any = random_module(path)
    inputs = torch.randn(2, 48, 6, 6) if path == CONV else torch.eye(48)
    with torch.no_grad():
        weight = ours.weight.detach().clone()
        ours.weight.add_(adapter.layers[path].delta(weight).reshape(weight.shape))
        if kind == "full":
            ours.bias.add_(adapter.biases[path])
        torch.testing.assert_close(ours(inputs), module.org_module[0](inputs), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours.weight, weight, atol=1e-3)


def test_a_lycoris_norm_is_loaded(tmp_path: Path) -> None:
    norm = nn.GroupNorm(8, 48)
    module = NormModule("lora_unet_x", norm)
    state = random_state(module)
    file = tmp_path / "norm.safetensors"
    save_file({f"{kohya_name(NORM, 'tiny-sd')}.{key}": value for key, value in state.items()}, file)
    adapter = load_adapter(file)
    assert adapter.kinds == ("bias", "norm")
    assert torch.equal(adapter.layers[NORM].delta(), state["w_norm"])
    assert torch.equal(adapter.biases[NORM], state["b_norm"])


def test_the_two_dora_conventions_are_distinguished(tmp_path: Path) -> None:
    layers = []
    for kind in ("dora", "dora-in"):
        build, options = LYCORIS[kind]
        state = random_state(build("lora_unet_x", random_module(LINEAR), **options))
        save_file({f"{kohya_name(LINEAR, 'tiny-sd')}.{k}": v for k, v in state.items()}, tmp_path / "d.safetensors")
        layers.append(load_adapter(tmp_path / "d.safetensors").layers[LINEAR])
    assert [isinstance(x, DoRALayer) and x.per_output for x in layers] == [True, False]


class Model(nn.Module):
    """A model with two modules, under their names in the UNet of the embedded base."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Module()])
        block: Any = self.down_blocks[0]
        attention, resnet, transformer, attn1 = (nn.Module() for _ in range(4))
        attn1.to_q = random_module(LINEAR)
        transformer.attn1 = attn1
        attention.transformer_blocks = nn.ModuleList([transformer])
        resnet.conv1 = random_module(CONV)
        block.attentions, block.resnets = nn.ModuleList([attention]), nn.ModuleList([resnet])


PEFT: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"]),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "conv1"]),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3}, target_modules=["to_q", "conv1"]
    ),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q", "conv1"]),
    "bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["to_q", "conv1"]),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1"]),
    "loha-tucker": LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=["to_q", "conv1"]),
    "lokr": LoKrConfig(r=2, alpha=5, target_modules=["to_q", "conv1"]),
    "lokr-both": LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=8, target_modules=["to_q", "conv1"]),
    "lokr-whole": LoKrConfig(r=64, alpha=5, target_modules=["to_q", "conv1"]),
    "lokr-tucker": LoKrConfig(r=2, alpha=5, use_effective_conv2d=True, target_modules=["to_q", "conv1"]),
}


@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_adapter_changes_the_weights_as_in_peft(kind: str, source: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(Model(), PEFT[kind])
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "magnitude" in name:
                parameter.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that a bias looks like a shard of a factor
        model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter" / ("" if source == "folder" else "adapter_model.safetensors"))
    assert set(adapter.paths) == {LINEAR, CONV}
    before = {path: random_module(path) for path in (LINEAR, CONV)}
    merged = model.merge_and_unload()
    for path, original in before.items():
        after = merged.get_submodule(path.removeprefix("unet."))
        weight = original.weight.detach()
        ours = weight + adapter.layers[path].delta(weight).reshape(weight.shape)
        torch.testing.assert_close(ours, after.weight.detach(), atol=2e-6, rtol=1e-4)
        if kind == "bias":
            torch.testing.assert_close(original.bias + adapter.biases[path], after.bias, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["lora", "dora", "patterns", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-tucker"]
)
def test_peft_loads_the_layer_kinds_of_native_files(kind: str, tmp_path: Path) -> None:
    """The keys of a native file are loaded into PEFT modules."""
    source: Any = get_peft_model(Model(), PEFT[kind])
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    source.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft")
    save_adapter(adapter, tmp_path / "ours.safetensors")
    state = {key.removeprefix("unet."): value for key, value in load_file(tmp_path / "ours.safetensors").items()}
    target: Any = get_peft_model(Model(), PEFT[kind])
    result = set_peft_model_state_dict(target, {f"base_model.model.{key}": value for key, value in state.items()})
    assert not result.unexpected_keys
    for path in (LINEAR, CONV):
        weight = random_module(path).weight.detach()
        after = target.merge_and_unload().get_submodule(path.removeprefix("unet.")).weight.detach()
        ours = weight + adapter.layers[path].delta(weight).reshape(weight.shape)
        torch.testing.assert_close(ours, after, atol=2e-6, rtol=1e-4)
        target = get_peft_model(Model(), PEFT[kind])
        set_peft_model_state_dict(target, {f"base_model.model.{key}": value for key, value in state.items()})
