"""The notation of prompts: A1111's documented examples, and laws for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diffusion.errors import ConfigError
from lora_diffusion.prompts.emphasis import Prompt, WeightedText, parse_emphasis, parse_literal

WORDS = st.text(alphabet="abc ,'é", min_size=1, max_size=8)
WEIGHTS = st.floats(min_value=0.125, max_value=4).map(lambda weight: round(weight, 3))


def spans(text: str) -> list[tuple[str, float]]:
    return [(span.text, pytest.approx(span.weight)) for section in parse_emphasis(text) for span in section]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [
                ("a ", 1),
                ("house", 1.3 * 1.1 * 1.1),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.5 * 1.1),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
        ("(time: 1.2 ) at 10:30", [("time", 1.2), (" at 10:30", 1)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(none:0) (less:-1)", [("none", 0), (" ", 1), ("less", -1)]),
        ("BREAKING BAD", [("BREAKING BAD", 1)]),
        ("", [("", 1)]),
    ],
)
def test_the_notation_means_what_it_means_to_a1111(text: str, expected: list[tuple[str, float]]) -> None:
    assert spans(text) == expected


def test_break_begins_a_section() -> None:
    assert parse_emphasis("a cat BREAK (a dog:1.5)") == (
        (WeightedText("a cat "),),
        (WeightedText(" "), WeightedText("a dog", 1.5)),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a (cat", "opens a '('"),
        ("a cat)", "closes a ')' that is not open"),
        ("a [cat)", "closes a ')'"),
        ("(a BREAK b)", "opens a '('"),
        ("[cat:dog:0.5]", "other words for other steps"),
        ("[cat|dog]", "other words for other steps"),
        ("a cat:1.2)", "closes a ')'"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_emphasis(text)
    assert words in str(caught.value)
    assert repr(text) in str(caught.value)


@given(st.lists(st.tuples(WORDS, WEIGHTS), min_size=1, max_size=5))
def test_weights_are_read_as_written(parts: list[tuple[str, float]]) -> None:
    def by_letter(prompt: Prompt) -> list[tuple[str, float]]:
        return [(letter, span.weight) for section in prompt for span in section for letter in span.text]

    written = "".join(f"({text}:{weight})" for text, weight in parts)
    assert by_letter(parse_emphasis(written)) == [(letter, weight) for text, weight in parts for letter in text]


@given(st.text(alphabet="ab ()[]\\:.1|", max_size=20))
def test_escaped_text_and_plain_text_mean_themselves(text: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_emphasis(escaped) == parse_literal(text)


@given(st.text(alphabet="ab ()[]\\:.1|B", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read = parse_emphasis(text)
    except ConfigError:
        return
    assert all(section for section in read)
