"""Long prompts and emphasis weights, on random SD and SDXL bases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_diffusion.config.generate import GenerateConfig
from lora_diffusion.inference.sampling import encode_contexts, prompt_arguments, sample
from lora_diffusion.models.load import Base
from lora_diffusion.models.text_encoding import count_chunks, encode_prompts, split_chunks
from lora_diffusion.prompts.emphasis import parse_emphasis, parse_literal
from tests.helpers.random_bases import byte_tokenizer

MAX_TOKENS = 75
LONG_PROMPT = ", ".join(["a red cat in the snow"] * 6)
BOTH_FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


@torch.no_grad()
def encode(base: Base, *prompts: str) -> Tensor:
    return encode_prompts(base, prompts, size_px=32).hidden


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(family)


@BOTH_FAMILIES
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_short_prompt_is_encoded_as_by_diffusers(base: Base, negative: str) -> None:
    ours = prompt_arguments(encode_contexts(base, GenerateConfig(prompt="a cat, red", negative_prompt=negative)))
    with torch.no_grad():
        found = base.pipe.encode_prompt(
            prompt="a cat, red",
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative or None,
        )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    theirs = dict(zip(names, found, strict=False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@BOTH_FAMILIES
def test_a_long_prompt_is_the_concatenation_of_its_chunks(base: Base) -> None:
    tokenizer = base.pipe.tokenizer
    count = count_chunks(base, [parse_literal(LONG_PROMPT)])
    assert count == 2
    texts = [
        tokenizer.decode([token for token, _ in chunk]) for chunk in split_chunks(tokenizer, parse_literal(LONG_PROMPT))
    ]
    parts = torch.cat([encode(base, text) for text in texts], dim=1)
    assert torch.allclose(encode(base, LONG_PROMPT), parts, atol=1e-5)
    context = encode_prompts(base, [LONG_PROMPT], size_px=32)
    if context.added:
        first = encode_prompts(base, [texts[0]], size_px=32).added
        assert first
        assert torch.allclose(context.added["text_embeds"], first["text_embeds"], atol=1e-5)


@BOTH_FAMILIES
def test_prompts_of_a_batch_are_padded_with_the_empty_prompt(base: Base) -> None:
    together = encode(base, "a cat", LONG_PROMPT)
    alone = torch.cat([encode(base, "a cat"), encode(base, "")], dim=1)
    assert torch.allclose(together[:1], alone, atol=1e-5)
    assert torch.allclose(together[1:], encode(base, LONG_PROMPT), atol=1e-5)


def test_break_ends_a_chunk(sd: Base) -> None:
    assert torch.allclose(
        encode(sd, "a cat BREAK a dog"), torch.cat([encode(sd, "a cat"), encode(sd, "a dog")], dim=1), atol=1e-5
    )


@BOTH_FAMILIES
def test_weights_interpolate_between_the_empty_prompt_and_the_token(base: Base) -> None:
    plain, empty = encode(base, "cat dog"), encode(base, "")
    assert torch.equal(encode(base, "(cat:1) (dog:1.0)"), plain)
    cat = slice(1, 1 + len(base.pipe.tokenizer("cat").input_ids) - 2)
    for weight in (0.0, 0.5, 1.3, -1.0):
        moved = encode(base, f"(cat:{weight}) dog")
        expected = plain.clone()
        expected[:, cat] = empty[:, cat] + weight * (plain[:, cat] - empty[:, cat])
        assert torch.allclose(moved, expected, atol=1e-5)


def test_a_chunk_ends_at_a_late_comma_or_else_at_a_word(sd: Base) -> None:
    tokenizer = sd.pipe.tokenizer

    def first(text: str) -> str:
        return tokenizer.decode([token for token, _ in split_chunks(tokenizer, parse_literal(text))[0]]).strip()

    assert first("x " * 60 + ", " + "y " * 40) == ("x " * 60).strip() + " ,"
    assert first(", " + "y " * 80) == ", " + ("y " * 74).strip()
    assert first("y " * 72 + "abcdefg z") == ("y " * 72).strip()
    assert first("q" * 100) == "q" * 75


@given(st.text(alphabet="ab, c", max_size=400))
def test_chunks_keep_every_token_in_order(text: str) -> None:
    tokenizer = byte_tokenizer()
    chunks = split_chunks(tokenizer, parse_literal(text))
    assert [token for chunk in chunks for token, _ in chunk] == tokenizer(text, add_special_tokens=False).input_ids
    assert all(len(chunk) <= MAX_TOKENS for chunk in chunks)
    assert len([chunk for chunk in chunks if not chunk]) <= 1


def test_the_end_of_a_long_prompt_changes_the_image(sd: Base) -> None:
    def picture(prompt: str, negative: str = "") -> bytes:
        settings = GenerateConfig(prompt=prompt, negative_prompt=negative, num_inference_steps=2, width=32, height=32)
        return sample(sd, settings).tobytes()

    assert picture(f"{LONG_PROMPT} cat") != picture(f"{LONG_PROMPT} dog")
    assert picture("a cat", f"{LONG_PROMPT} cat") != picture("a cat", f"{LONG_PROMPT} dog")
    assert picture("a (cat:1.5)") != picture("a cat")
    assert len(parse_emphasis(LONG_PROMPT)[0]) == 1
