r"""Parse A1111's prompt emphasis and chunk breaks.

    (word)          weight 1.1         (word:1.3)      weight 1.3
    [word]          weight 1 / 1.1     ((word:0.8))    nested weights multiply
    \( \) \[ \]     literal brackets   BREAK           start a new chunk

This is the syntax of A1111 and Forge. Their prompt editing `[a:b:0.5]` and alternation `[a|b]`, which change the prompt
from step to step, are not supported and raise an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_diffusion.errors import ConfigError

EMPHASIS = 1.1
"""Weight of one pair of round brackets; a pair of square brackets divides by it."""
_TOKENS = re.compile(
    r"""\\(?P<literal>[()\[\]\\])
    | (?P<opens>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<closes>[)\]])
    | (?<!\w)(?P<section>BREAK)(?!\w)
    | (?P<text>[^\\()\[\]:B]+|.)""",
    re.VERBOSE | re.DOTALL,
)
_PAIRS = {")": "(", "]": "["}


@dataclass(frozen=True)
class WeightedText:
    """A span of a prompt with one weight."""

    text: str
    weight: float = 1.0


Prompt = tuple[tuple[WeightedText, ...], ...]
"""A parsed prompt: sections separated by `BREAK`, each a sequence of spans."""
ReadText = Callable[[str], Prompt]
"""A prompt parser: `parse_emphasis` or `parse_literal`."""


def parse_literal(text: str) -> Prompt:
    """Return the text as a single span, without interpreting brackets or `BREAK`."""
    return ((WeightedText(text),),)


def parse_emphasis(text: str) -> Prompt:
    """Parse a prompt with A1111's emphasis syntax.

    Raises:
        ConfigError: If brackets do not pair, or the prompt uses prompt editing or alternation.
    """
    sections: list[list[WeightedText]] = [[]]
    spans = sections[0]
    open_brackets: list[tuple[str, int]] = []
    for match in _TOKENS.finditer(text):
        literal = match["literal"] or match["text"]
        if literal:
            _check_no_prompt_editing(text, literal, open_brackets)
            spans.append(WeightedText(literal))
        elif match["opens"]:
            open_brackets.append((match["opens"], len(spans)))
        elif match["section"]:
            _check_brackets_closed(text, open_brackets)
            spans = list[WeightedText]()
            sections.append(spans)
        else:
            closes = match["closes"] or ")"
            opened, first = open_brackets.pop() if open_brackets else ("", 0)
            if opened != _PAIRS[closes]:
                raise ConfigError(
                    f"the prompt {text!r} closes a {closes!r} that is not open; write \\{closes} for a literal bracket"
                )
            factor = float(match["weight"] or (EMPHASIS if closes == ")" else 1 / EMPHASIS))
            spans[first:] = [replace(span, weight=span.weight * factor) for span in spans[first:]]
    _check_brackets_closed(text, open_brackets)
    return tuple(tuple(_merge_spans(spans)) for spans in sections)


def _check_brackets_closed(text: str, open_brackets: list[tuple[str, int]]) -> None:
    """Raise ConfigError if a bracket is still open at the end of a section."""
    if open_brackets:
        bracket = open_brackets[-1][0]
        raise ConfigError(
            f"the prompt {text!r} opens a {bracket!r} and does not close it; close it, or write \\{bracket} for a "
            "literal bracket"
        )


def _check_no_prompt_editing(text: str, piece: str, open_brackets: list[tuple[str, int]]) -> None:
    """Raise ConfigError for A1111's prompt editing and alternation."""
    if open_brackets and open_brackets[-1][0] == "[" and (":" in piece or "|" in piece):
        raise ConfigError(
            f"the prompt {text!r} uses prompt editing ([a:b:0.5]) or alternation ([a|b]), which are not supported; "
            "write \\[ for a literal bracket"
        )


def _merge_spans(spans: list[WeightedText]) -> list[WeightedText]:
    """Join neighboring spans of equal weight, so that text without emphasis is tokenized in one piece."""
    result: list[WeightedText] = []
    for span in spans:
        if result and result[-1].weight == span.weight:
            result[-1] = replace(span, text=result[-1].text + span.text)
        else:
            result.append(span)
    return result or [WeightedText("")]
