"""How often readings agree with what was asked for."""

from collections.abc import Sequence

from train_scripts.picture_world.scene import Figure, Scene
from train_scripts.tiny_judge.prompts import Question
from train_scripts.tiny_judge.reader import NONE, Reading
from train_scripts.tiny_judge.statistics import share_of


def read_figures(reading: Reading) -> list[tuple[str, str]]:
    """Subject and color of each figure that the reader sees, from left to right."""
    answers = reading.answers
    seen = [(answers["subject"], answers["color"])]
    if answers["second_subject"] != NONE:
        seen.append((answers["second_subject"], answers["second_color"]))
    return seen


def has_subjects(reading: Reading, figures: Sequence[Figure]) -> bool:
    """Whether exactly these subjects are seen, in any order."""
    return sorted(name for name, _ in read_figures(reading)) == sorted(f.subject for f in figures)


def has_bindings(reading: Reading, figures: Sequence[Figure]) -> bool:
    """Whether exactly these subjects are seen, each in its color."""
    return sorted(read_figures(reading)) == sorted((f.subject, f.color) for f in figures)


def is_setting(reading: Reading, scene: Scene) -> bool:
    return reading.answers["setting"] == scene.setting


def score_questions(readings: Sequence[Reading], questions: Sequence[Question]) -> dict[str, dict[str, dict]]:
    """Shares of right answers by group: subject, color given the subject, setting, all of them, count, side."""
    table: dict[str, dict[str, dict]] = {}
    for group in dict.fromkeys(q.group for q in questions):
        rows = [(r, q.scene) for r, q in zip(readings, questions, strict=True) if q.group == group]
        named = [has_subjects(r, s.figures) for r, s in rows]
        bound = [has_bindings(r, s.figures) for r, s in rows]
        places = [is_setting(r, s) for r, s in rows]
        table[group] = {
            "subject": share_of(named),
            "color": share_of([b for b, n in zip(bound, named, strict=True) if n]),
            "subject and color": share_of(bound),
            "setting": share_of(places),
            "all": share_of([b and p for b, p in zip(bound, places, strict=True)]),
            "count": share_of([r.count == len(s.figures) for r, s in rows]),
        }
        if group == "side":
            table[group]["side"] = share_of([r.answers["side"] == s.side for r, s in rows])
    return table
