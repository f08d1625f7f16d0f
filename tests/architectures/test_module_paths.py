"""Module paths computed from configurations, compared with the modules of the models themselves."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_diffusion.architectures.families import FAMILIES, SD1, SDXL, TINY_SD, detect_family
from lora_diffusion.architectures.module_paths import layout_from_configs, module_paths
from lora_diffusion.errors import BaseModelError
from lora_diffusion.models.load import Base, transformers_path

SD_BLOCKS = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_SIZE = {
    "SD 1.5": {**SD_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2.1": {
        **SD_BLOCKS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": {**SDXL_BLOCKS, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20)},
}


def weighted_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_unet_paths_are_the_modules_of_full_size_unets(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE[name])
    paths = [p.removeprefix("unet.") for p in module_paths(layout_from_configs(FULL_SIZE[name], {}))]
    assert len(paths) == len(set(paths))
    assert set(paths) == weighted_modules(unet)


def test_text_encoder_paths_are_the_modules_of_clip() -> None:
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    layout = layout_from_configs(FULL_SIZE["SD 1.5"], {"text_encoder": {"num_hidden_layers": 12}})
    paths = {p.removeprefix("text_encoder.") for p in module_paths(layout) if p.startswith("text_encoder.")}
    assert {transformers_path(encoder, p) for p in paths} == weighted_modules(encoder)


def test_paths_of_the_random_bases_are_their_modules(sd: Base, sdxl: Base) -> None:
    for base in (sd, sdxl):
        live = {
            f"{component}.{name}"
            for component in base.family.components
            for name in weighted_modules(getattr(base.pipe, component))
        }
        spelled = {
            f"{p.split('.', 1)[0]}.{transformers_path(getattr(base.pipe, p.split('.', 1)[0]), p.split('.', 1)[1])}"
            for p in base.paths
        }
        assert spelled == live


def test_family_is_detected_from_the_width() -> None:
    assert detect_family(768, two_encoders=False) is SD1
    assert detect_family(2048, two_encoders=True) is SDXL
    assert detect_family(128, two_encoders=False) is TINY_SD
    assert set(FAMILIES) == {"sd1", "sd2", "sdxl", "tiny-sd", "tiny-sdxl"}


def test_wrong_number_of_text_encoders_is_rejected() -> None:
    with pytest.raises(BaseModelError, match=r"SDXL, which does not have one text encoder"):
        detect_family(2048, two_encoders=False)
