"""Prompts of any length and their weights, in random bases of both kinds."""

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

ROOM = 75
LONG = ", ".join(["a red cat in the snow"] * 6)
BOTH = pytest.mark.parametrize("family", ["sd", "sdxl"])


@torch.no_grad()
def hidden(base: Base, *prompts: str) -> Tensor:
    return encode_prompts(base, prompts, size_px=32).hidden


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(family)


@BOTH
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_short_prompt_is_what_diffusers_reads(base: Base, negative: str) -> None:
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


@BOTH
def test_a_long_prompt_is_its_chunks_one_after_another(base: Base) -> None:
    tokenizer = base.pipe.tokenizer
    count = count_chunks(base, [parse_literal(LONG)])
    assert count == 2
    texts = [tokenizer.decode([token for token, _ in chunk]) for chunk in split_chunks(tokenizer, parse_literal(LONG))]
    parts = torch.cat([hidden(base, text) for text in texts], dim=1)
    assert torch.allclose(hidden(base, LONG), parts, atol=1e-5)
    context = encode_prompts(base, [LONG], size_px=32)
    if context.added:
        first = encode_prompts(base, [texts[0]], size_px=32).added
        assert first
        assert torch.allclose(context.added["text_embeds"], first["text_embeds"], atol=1e-5)


@BOTH
def test_prompts_of_a_batch_are_filled_up_with_the_empty_one(base: Base) -> None:
    together = hidden(base, "a cat", LONG)
    alone = torch.cat([hidden(base, "a cat"), hidden(base, "")], dim=1)
    assert torch.allclose(together[:1], alone, atol=1e-5)
    assert torch.allclose(together[1:], hidden(base, LONG), atol=1e-5)


def test_break_is_where_a_chunk_ends(sd: Base) -> None:
    assert torch.allclose(
        hidden(sd, "a cat BREAK a dog"), torch.cat([hidden(sd, "a cat"), hidden(sd, "a dog")], dim=1), atol=1e-5
    )


@BOTH
def test_weights_move_states_along_the_line_from_the_empty_prompt(base: Base) -> None:
    read, empty = hidden(base, "cat dog"), hidden(base, "")
    assert torch.equal(hidden(base, "(cat:1) (dog:1.0)"), read)
    cat = slice(1, 1 + len(base.pipe.tokenizer("cat").input_ids) - 2)
    for weight in (0.0, 0.5, 1.3, -1.0):
        moved = hidden(base, f"(cat:{weight}) dog")
        expected = read.clone()
        expected[:, cat] = empty[:, cat] + weight * (read[:, cat] - empty[:, cat])
        assert torch.allclose(moved, expected, atol=1e-5)


def test_a_chunk_ends_at_a_comma_near_its_end_else_at_a_word(sd: Base) -> None:
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
    assert all(len(chunk) <= ROOM for chunk in chunks)
    assert len([chunk for chunk in chunks if not chunk]) <= 1


def test_the_end_of_a_long_prompt_is_in_the_picture(sd: Base) -> None:
    def picture(prompt: str, negative: str = "") -> bytes:
        settings = GenerateConfig(prompt=prompt, negative_prompt=negative, steps=2, width=32, height=32)
        return sample(sd, settings).tobytes()

    assert picture(f"{LONG} cat") != picture(f"{LONG} dog")
    assert picture("a cat", f"{LONG} cat") != picture("a cat", f"{LONG} dog")
    assert picture("a (cat:1.5)") != picture("a cat")
    assert len(parse_emphasis(LONG)[0]) == 1
