"""Stable Diffusion and SDXL in miniature with random weights, written as folders in diffusers' layout.

Module names, block structure and text encoders are the real ones'; only the widths are small.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: every byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *[c + "</w>" for c in alphabet], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def text_config(width: int, vocabulary: int, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        **changes,
    )


def random_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def random_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def write_random_sd(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    StableDiffusionPipeline(
        vae=random_vae(),
        text_encoder=CLIPTextModel(text_config(32, len(tokenizer))),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=random_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_random_sdxl(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=72,
        attention_head_dim=4,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
    )
    StableDiffusionXLPipeline(
        vae=random_vae(),
        text_encoder=CLIPTextModel(text_config(32, len(tokenizer))),
        text_encoder_2=CLIPTextModelWithProjection(text_config(40, len(tokenizer))),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=random_scheduler(),
    ).save_pretrained(folder)
    return folder
