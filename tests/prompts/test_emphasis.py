"""Prompt emphasis: the examples of A1111's documentation, and properties of arbitrary text."""

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
def test_emphasis_equals_a1111(text: str, expected: list[tuple[str, float]]) -> None:
    assert spans(text) == expected


def test_break_starts_a_section() -> None:
    assert parse_emphasis("a cat BREAK (a dog:1.5)") == (
        (WeightedText("a cat "),),
        (WeightedText(" "), WeightedText("a dog", 1.5)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (cat", "opens a '('"),
        ("a cat)", "closes a ')' that is not open"),
        ("a [cat)", "closes a ')'"),
        ("(a BREAK b)", "opens a '('"),
        ("[cat:dog:0.5]", "prompt editing"),
        ("[cat|dog]", "prompt editing"),
        ("a cat:1.2)", "closes a ')'"),
    ],
)
def test_invalid_syntax_raises_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_emphasis(text)
    assert message in str(caught.value)
    assert repr(text) in str(caught.value)


@given(st.lists(st.tuples(WORDS, WEIGHTS), min_size=1, max_size=5))
def test_written_weights_parse_back(parts: list[tuple[str, float]]) -> None:
    def weights_by_letter(prompt: Prompt) -> list[tuple[str, float]]:
        return [(letter, span.weight) for section in prompt for span in section for letter in span.text]

    written = "".join(f"({text}:{weight})" for text, weight in parts)
    assert weights_by_letter(parse_emphasis(written)) == [(letter, weight) for text, weight in parts for letter in text]


@given(st.text(alphabet="ab ()[]\\:.1|", max_size=20))
def test_escaped_text_parses_to_the_literal_text(text: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse_emphasis(escaped) == parse_literal(text)


@given(st.text(alphabet="ab ()[]\\:.1|B", max_size=20))
def test_any_text_parses_or_raises_config_error(text: str) -> None:
    try:
        prompt = parse_emphasis(text)
    except ConfigError:
        return
    assert all(section for section in prompt)
