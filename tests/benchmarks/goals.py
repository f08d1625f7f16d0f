"""Goals of the benchmarks: limits that measured figures are compared with, and the report that says which are met.

A benchmark lists its goals by the path of the figure in its JSON output, such as `sd1/times_copying/ours`; a row of a
list is named by the value of its first field. `write_report` adds the comparison to that output under "goals" and
returns the exit status of the benchmark.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A limit for one figure: a maximum, or a minimum with `at_least`."""

    limit: float
    at_least: bool = False
    source: str = "stated goal"
    """Where the limit comes from: a stated goal, or a recorded figure and its tolerance."""

    def is_met(self, value: float | None) -> bool:
        """Return whether a figure meets the goal; a figure that is missing or not a number does not."""
        if value is None:
            return False
        return value >= self.limit if self.at_least else value <= self.limit


def at_most(limit: float) -> Goal:
    """Return a stated goal that is met by smaller figures."""
    return Goal(limit=limit)


def at_least(limit: float) -> Goal:
    """Return a stated goal that is met by larger figures."""
    return Goal(limit=limit, at_least=True)


def not_above(recorded: float, *, tolerance: float) -> Goal:
    """Return a regression limit for a figure without a stated goal: the recorded figure plus a relative tolerance."""
    source = f"regression limit: recorded {recorded:g} plus {tolerance:.0%}"
    return Goal(limit=float(f"{recorded * (1 + tolerance):.4g}"), source=source)


def not_below(recorded: float, *, tolerance: float) -> Goal:
    """Return a regression limit for a figure that should be large: the recorded figure minus a relative tolerance."""
    source = f"regression limit: recorded {recorded:g} minus {tolerance:.0%}"
    return Goal(limit=float(f"{recorded * (1 - tolerance):.4g}"), at_least=True, source=source)


def figures_by_path(figures: Any, path: str = "") -> dict[str, float]:
    """Return all numbers and booleans of a JSON value by their path."""
    if isinstance(figures, bool | int | float):
        return {path: figures}
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(figures, Mapping):
        parts = figures.items()
    elif isinstance(figures, list):
        parts = ((next(iter(row.values())), row) for row in figures if isinstance(row, Mapping))
    return {
        key: value
        for name, part in parts
        for key, value in figures_by_path(part, f"{path}/{name}" if path else str(name)).items()
    }


def compare(figures: Mapping[str, Any], goals: Mapping[str, Goal]) -> dict[str, dict[str, Any]]:
    """Return the "goals" table of a benchmark's output: limit, value and whether it is met, for each path."""
    values = figures_by_path(figures)
    return {
        path: {
            "limit": goal.limit,
            "kind": "at least" if goal.at_least else "at most",
            "value": values.get(path),
            "met": goal.is_met(values.get(path)),
            "source": goal.source,
        }
        for path, goal in goals.items()
    }


def print_missed(table: Mapping[str, Mapping[str, Any]]) -> int:
    """Print each missed goal of a "goals" table to standard error and return the exit status, 1 for any miss."""
    missed = {path: row for path, row in table.items() if not row["met"]}
    for path, row in missed.items():
        print(
            f"missed: {path} is {row['value']}, goal {row['kind']} {row['limit']:g} ({row['source']})", file=sys.stderr
        )
    return int(bool(missed))


def write_report(output: Path, figures: Mapping[str, Any], goals: Mapping[str, Goal]) -> int:
    """Write and print figures with their "goals" table; missed goals go to standard error.

    Args:
        output: The JSON file of the benchmark.
        figures: Its measured figures, ready for JSON.
        goals: Its goals by the path of the figure.

    Returns:
        The exit status: 0 if all goals are met, else 1.
    """
    table = compare(figures, goals)
    text = json.dumps({**figures, "goals": table}, indent=1)
    output.write_text(text + "\n")
    print(text)
    return print_missed(table)
