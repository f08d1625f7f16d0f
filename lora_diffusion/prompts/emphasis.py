r"""A prompt as people write it: words that count more or less, and where a new chunk begins.

    (word)          1.1 times          (word:1.3)      1.3 times
    [word]          1 / 1.1 times      ((word:0.8))    both, multiplied
    \( \) \[ \]     the sign itself    BREAK           the next words start a new chunk

This is the notation of A1111 and Forge, so that their prompts can be read. What they do with `[a:b:0.5]` and `[a|b]`,
other words at other steps, is refused rather than misread.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_diffusion.errors import ConfigError

EMPHASIS = 1.1
"""What a pair of plain brackets counts."""
SIGNS = re.compile(
    r"""\\(?P<literal>[()\[\]\\])
    | (?P<opens>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<closes>[)\]])
    | (?<!\w)(?P<section>BREAK)(?!\w)
    | (?P<text>[^\\()\[\]:B]+|.)""",
    re.VERBOSE | re.DOTALL,
)
PAIRS = {")": "(", "]": "["}


@dataclass(frozen=True)
class WeightedText:
    """Words that count equally."""

    text: str
    weight: float = 1.0


Prompt = tuple[tuple[WeightedText, ...], ...]
"""Spans in order, in sections that `BREAK` divides."""
ReadText = Callable[[str], Prompt]


def parse_literal(text: str) -> Prompt:
    """The text to the letter, brackets and all."""
    return ((WeightedText(text),),)


def parse_emphasis(text: str) -> Prompt:
    """The text with its notation read. Raises ConfigError for brackets that do not pair and for what is not done."""
    sections: list[list[WeightedText]] = [[]]
    spans = sections[0]
    open_brackets: list[tuple[str, int]] = []
    for match in SIGNS.finditer(text):
        literal = match["literal"] or match["text"]
        if literal:
            check_no_prompt_editing(text, literal, open_brackets)
            spans.append(WeightedText(literal))
        elif match["opens"]:
            open_brackets.append((match["opens"], len(spans)))
        elif match["section"]:
            check_brackets_closed(text, open_brackets)
            spans = []
            sections.append(spans)
        else:
            closes = match["closes"] or ")"
            opened, first = open_brackets.pop() if open_brackets else ("", 0)
            if opened != PAIRS[closes]:
                raise ConfigError(f"the prompt {text!r} closes a {closes!r} that is not open; write \\{closes} for it")
            factor = float(match["weight"] or (EMPHASIS if closes == ")" else 1 / EMPHASIS))
            spans[first:] = [replace(span, weight=span.weight * factor) for span in spans[first:]]
    check_brackets_closed(text, open_brackets)
    return tuple(tuple(merge_spans(spans)) for spans in sections)


def check_brackets_closed(text: str, open_brackets: list[tuple[str, int]]) -> None:
    """Raise ConfigError if a bracket is not closed by the end of its section."""
    if open_brackets:
        sign = open_brackets[-1][0]
        raise ConfigError(f"the prompt {text!r} opens a {sign!r} and does not close it; close it, or write \\{sign}")


def check_no_prompt_editing(text: str, piece: str, open_brackets: list[tuple[str, int]]) -> None:
    """Raise ConfigError for what would change words from step to step."""
    if open_brackets and open_brackets[-1][0] == "[" and (":" in piece or "|" in piece):
        raise ConfigError(
            f"the prompt {text!r} has other words for other steps ([a:b:0.5] or [a|b]), which is not done here; "
            "write \\[ for a plain bracket"
        )


def merge_spans(spans: list[WeightedText]) -> list[WeightedText]:
    """The same with neighbors of one weight as one, so that a text without weights stays in one piece."""
    result: list[WeightedText] = []
    for span in spans:
        if result and result[-1].weight == span.weight:
            result[-1] = replace(span, text=result[-1].text + span.text)
        else:
            result.append(span)
    return result or [WeightedText("")]
