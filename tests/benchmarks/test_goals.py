"""Goals of the benchmarks: comparisons, exit status, and the committed figures with their own goals."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.goals import (
    Goal,
    at_least,
    at_most,
    compare,
    figures_by_path,
    not_above,
    not_below,
    print_missed,
    write_report,
)

RECORDED = sorted(Path(__file__).parent.glob("*.json"))
FIGURES = {"sd1": {"ours": 1.65, "peer": 2.3}, "rows": [{"rank": 8, "error": 0.5}], "same": True, "machine": "x86_64"}


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (at_most(2), 2, True),
        (at_most(2), 2.01, False),
        (at_least(2), 2, True),
        (at_least(2), 1.99, False),
        (at_least(1), True, True),
        (at_least(1), False, False),
        (at_most(2), math.nan, False),
        (at_least(2), math.nan, False),
        (at_most(2), None, False),
        (not_above(10, tolerance=0.5), 15, True),
        (not_above(10, tolerance=0.5), 15.1, False),
        (not_below(10, tolerance=0.25), 7.5, True),
        (not_below(10, tolerance=0.25), 7.4, False),
    ],
)
def test_a_limit_itself_meets_the_goal_and_what_was_not_measured_does_not(
    goal: Goal, value: float | None, met: bool
) -> None:
    assert goal.is_met(value) is met


def test_a_figure_is_found_by_its_path_and_a_row_by_its_first_field() -> None:
    assert figures_by_path(FIGURES) == {
        "sd1/ours": 1.65,
        "sd1/peer": 2.3,
        "rows/8/rank": 8,
        "rows/8/error": 0.5,
        "same": True,
    }


def test_the_table_holds_limit_value_verdict_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    table = compare(FIGURES, {"sd1/ours": at_most(1.8), "rows/8/error": not_above(0.4, tolerance=0.1)})
    assert table == {
        "sd1/ours": {"limit": 1.8, "kind": "at most", "value": 1.65, "met": True, "source": "stated goal"},
        "rows/8/error": {
            "limit": 0.44,
            "kind": "at most",
            "value": 0.5,
            "met": False,
            "source": "regression limit: recorded 0.4 plus 10%",
        },
    }
    assert print_missed(table) == 1
    sentence = "missed: rows/8/error is 0.5, goal at most 0.44 (regression limit: recorded 0.4 plus 10%)\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(("limit", "status"), [(1.8, 0), (1.6, 1)])
def test_a_report_is_written_either_way_and_a_miss_is_its_exit_status(
    limit: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goals = {"sd1/ours": at_most(limit)}
    assert write_report(tmp_path / "report.json", FIGURES, goals) == status
    assert json.loads((tmp_path / "report.json").read_text()) == {**FIGURES, "goals": compare(FIGURES, goals)}
    printed = capsys.readouterr()
    assert json.loads(printed.out)["goals"]["sd1/ours"]["met"] is (status == 0)
    assert printed.err.count("missed: sd1/ours is 1.65") == status


def test_a_figure_that_is_missing_is_a_missed_goal(tmp_path: Path) -> None:
    assert write_report(tmp_path / "report.json", FIGURES, {"sd1/other": at_least(0)}) == 1


@pytest.mark.parametrize("output", RECORDED, ids=[output.stem for output in RECORDED])
def test_recorded_figures_are_compared_with_the_goals_of_their_benchmark(output: Path) -> None:
    recorded: dict[str, Any] = json.loads(output.read_text())
    table = recorded.pop("goals")
    goals = import_module(f"tests.benchmarks.{output.stem}").GOALS
    assert table
    assert table == compare(recorded, goals)
    assert all(row["value"] is not None for row in table.values())
