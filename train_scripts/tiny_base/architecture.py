"""The embedded base's parts, built from configuration: a Stable Diffusion in miniature.

128 px pictures, latents of 16x16 with 24 channels, a UNet with cross-attention at every resolution, and a CLIP text
encoder whose tokenizer has one token for every word of the world.
"""

import json
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE_PX = 128
LATENT_CHANNELS = 24
TEXT_WIDTH = 128
MAX_TOKENS = 40
VAE_CHANNELS = (16, 32, 64, 128)
UNET_CHANNELS = (64, 128, 224)
UNET_HEADS = (2, 4, 7)


def build_vae(latents: int, channels: tuple[int, ...]) -> AutoencoderKL:
    """An autoencoder with these channels of its latents and levels; each level but the last halves the picture."""
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=2,  # more groups than that stall the narrow first level
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )


def build_unet(side: int, latents: int, channels: tuple[int, ...], heads: tuple[int, ...]) -> UNet2DConditionModel:
    """A UNet for latents of side x side x latents, with cross-attention at every level."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latents,
        out_channels=latents,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=heads,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def new_vae() -> AutoencoderKL:
    return build_vae(LATENT_CHANNELS, VAE_CHANNELS)


def new_unet() -> UNet2DConditionModel:
    return build_unet(SIZE_PX // 2 ** (len(VAE_CHANNELS) - 1), LATENT_CHANNELS, UNET_CHANNELS, UNET_HEADS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=384,
            num_attention_heads=4,
            num_hidden_layers=3,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR, so that night is dark and snow is bright [arXiv:2305.08891]."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def new_tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE, with merges that make one token of each given word; other words fall to bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = find_merges(words)
    tokens = [*alphabet, *[c + "</w>" for c in alphabet], *dict.fromkeys(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    config = {"model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def find_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges, by priority, after which every word is one token.

    A merge for one word can take letters that another word wanted joined differently, so that words are split again
    with all merges until none has more than one piece.
    """
    merges: dict[tuple[str, str], int] = {}
    complete = False
    while not complete:
        complete = True
        for word in sorted(set(words)):
            while len(pieces := split_word(word, merges)) > 1:
                merges[pieces[0], pieces[1]] = len(merges)
                complete = False
    return list(merges)


def split_word(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a word after all merges, the earliest merge first [arXiv:1508.07909]."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        ranked = [(merges[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in merges]
        if not ranked:
            return pieces
        _, i = min(ranked)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
