"""The methods under test, and what is asked of a base with one of them on it."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.coefficients import DenoisingStep
from lora_diffusion.adapters.layers import DoRALayer, LoHaLayer, LoKrLayer, LoRALayer
from lora_diffusion.architectures.module_paths import changeable_paths, trainable_paths
from lora_diffusion.architectures.targets import resolve_modules_to_save, resolve_targets
from lora_diffusion.config.adapter import AdapterConfig
from lora_diffusion.models.load import Base
from lora_diffusion.training.methods.injection import inject

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "alpha": 2.0},
    "lora-fa": {"freeze_down": True},
    "orthogonal": {"init_weights": "orthogonal"},
    "pissa": {"init_weights": "pissa"},
    "dora": {"use_dora": True},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
    "dora on lokr": {"kind": "lokr", "use_dora": True},
    "vera": {"kind": "vera", "rank": 16},
    "adalora": {"kind": "adalora"},
    "dylora": {"kind": "dylora"},
    "sparse": {"kind": "sparse", "sparse_l1": 0.1},
    "dropouts": {"dropout": 0.1, "rank_dropout": 0.3, "module_dropout": 0.2},
    "by block": {"rank_pattern": {"unet.down_blocks": 1, "unet.mid_block.*": 6}},
    "t-lora": {"kind": "t-lora", "init_weights": "orthogonal"},
    "mixed": {"modules_to_save": ("unet.conv_in", "unet.*.norm1")},
}
MOMENT = DenoisingStep(index=6, total=10)
"""Of the timestep that `predicted` asks about, of a thousand."""
CONVOLUTIONS = {"unet_target_modules": ("attention", "convolutions")}
KINDS = {"lora": LoRALayer, "loha": LoHaLayer, "lokr": LoKrLayer, "dora": DoRALayer, "dora on lokr": DoRALayer}


def config_of(method: str, **more: object) -> AdapterConfig:
    wide = {} if method == "pissa" else CONVOLUTIONS
    return AdapterConfig.model_validate({"rank": 4, **wide, **METHODS[method], **more})


def predicted(base: Base) -> Tensor:
    """What the UNet says to fixed noise."""
    generator = torch.Generator().manual_seed(5)
    unet: Any = base.pipe.unet
    size = unet.config.sample_size
    latents = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    hidden = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([400, 400]), encoder_hidden_states=hidden).sample


def injected(base: Base, config: AdapterConfig, seed: int = 0) -> tuple[list[str], Any]:
    """Paths of attention and convolutions with updates on them, and what came of it."""
    paths = resolve_targets(trainable_paths(base.layout), unet=config.unet_target_modules, text_encoders=())
    full = resolve_modules_to_save(changeable_paths(base.layout), config.modules_to_save, paths)
    return [*paths, *full], inject(base, paths, config, seed, full=full, steps=20)


def shake(parameters: dict[str, nn.Parameter]) -> None:
    """Some values in everything that learns."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def module_of(kind: str) -> Any:
    torch.manual_seed(0)
    made = nn.Linear(12, 8) if kind == "linear" else nn.Conv2d(12, 8, 3, padding=1)
    return made.requires_grad_(False)
