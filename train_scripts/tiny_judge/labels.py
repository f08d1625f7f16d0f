"""What the reader should say of a scene, and which questions a style leaves open."""

from dataclasses import dataclass

from train_scripts.picture_world.compose import Drawing
from train_scripts.picture_world.figures.subjects import CHARACTERS
from train_scripts.picture_world.scene import Figure, Scene
from train_scripts.picture_world.shapes import bounds
from train_scripts.tiny_judge.reader import HEADS, MALFORMED_SUBJECT, NONE

COLORLESS = ("sketch", "gray", "ink", "blueprint")
"""Styles without the scene's colors."""
TIMELESS = ("sketch", "chalk", "neon", "ink", "blueprint", "crayon", "watercolor", "pixel")
"""Styles in which the time of day cannot be told, or hardly."""
IGNORED = -100
"""The label that cross_entropy skips."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The answers to all questions; None where the picture does not tell."""

    answers: dict[str, str | None]

    def numbers(self) -> list[int]:
        """Label numbers in the order of the heads."""
        return [IGNORED if (a := self.answers[name]) is None else HEADS[name].index(a) for name in HEADS]


def left_to_right(scene: Scene, drawing: Drawing) -> list[Figure]:
    """Figures by the middle of their shapes."""
    middles = [sum(bounds(shapes)[::2]) for shapes in drawing.figures]
    return [figure for _, figure in sorted(zip(middles, scene.figures, strict=True), key=lambda pair: pair[0])]


def expect_answers(scene: Scene, drawing: Drawing, style: str = "flat", *, malformed: bool = False) -> Expected:
    """The right answers for a rendering of the scene in a style."""
    figures = left_to_right(scene, drawing)
    answers: dict[str, str | None] = {"setting": scene.setting, "style": style}
    answers["time"] = None if style in TIMELESS or scene.setting == "room" else scene.time
    for prefix, figure in zip(("", "second_"), [*figures, None], strict=False):
        shown = figure is not None and figure.subject not in CHARACTERS and style not in COLORLESS and not malformed
        answers[f"{prefix}subject"] = figure.subject if figure else NONE
        answers[f"{prefix}color"] = figure.color if figure and shown else None
    answers["side"] = scene.side if len(figures) == 1 else None
    if malformed:
        answers |= {"subject": MALFORMED_SUBJECT, "side": None}
    return Expected(answers=answers)
