"""The result of an analysis of adapters as aligned tables for the terminal."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_diffusion.core.tables import format_table

Report = Mapping[str, Any]
_MAX_PAIRS = 20


def describe_analysis(analysis: Report) -> str:
    """Format the result of `analyze_files` as text.

    Args:
        analysis: The result.

    Returns:
        Tables of the adapters, their blocks, the amplification and the overlap.
    """
    adapters, pairs = analysis["adapters"], sorted(analysis["pairs"], key=lambda pair: -pair["shared"])
    parts = [
        _format_totals(adapters),
        _format_by_block(
            adapters, "effective rank by block, medians over modules", lambda found: f"{found['effective_rank']:.1f}"
        ),
        _format_by_block(
            adapters, "Frobenius norm by block, over all modules", lambda found: _format_digits(found["norm"])
        ),
    ]
    if analysis["base"]:
        parts.append(_format_amplifications(adapters, analysis["base"]))
    if pairs:
        parts.append(_format_overlaps(pairs))
    if len(pairs) == 1:
        parts.append(_format_overlap_by_block(pairs[0]))
    return "\n\n".join([*parts, *_format_left_out(adapters)])


def _format_totals(adapters: Sequence[Report]) -> str:
    heading = ["", "family", "kind", "modules", "norm", "rank", "effective", "stable", "for 99 %"]
    title = "deltas; ranks are medians over modules; the last is the rank that contains 99 % of the energy"
    return f"{title}\n{format_table(heading, [*map(_format_total, adapters)], left=(0, 1, 2))}"


def _format_total(adapter: Report) -> list[str]:
    found = adapter["whole"]
    ranks = [f"{found['rank']:g}", f"{found['effective_rank']:.1f}", f"{found['stable_rank']:.1f}"]
    names = [_truncate_name(adapter["name"]), adapter["family"], adapter["kind"]]
    return [*names, str(found["modules"]), _format_digits(found["norm"]), *ranks, f"{found['rank_99']:g}"]


def _format_by_block(adapters: Sequence[Report], title: str, cell: Callable[[Report], str]) -> str:
    """Format a table with a row for each block and a column for each adapter."""
    blocks = sorted({block for adapter in adapters for block in adapter["blocks"]})
    found = [adapter["blocks"] for adapter in adapters]
    rows = [[block, *(cell(each[block]) if block in each else "-" for each in found)] for block in blocks]
    heading = ["", *(_truncate_name(adapter["name"], 12) for adapter in adapters)]
    return f"{title}\n{format_table(heading, rows)}"


def _format_amplifications(adapters: Sequence[Report], base: str) -> str:
    """Format medians over modules of the measurements in section 7.3 of LoRA [arXiv:2106.09685]."""
    keys = ("delta_norm", "projected", "own", "random", "factor")
    title = f"|U'WV|: norm of {base} in the directions of the delta, in its own leading ones, in random ones; medians"
    heading = ["", "|delta|", "|U'WV|", "own", "random", "|delta| / |U'WV|"]
    medians = [(_truncate_name(adapter["name"]), adapter["amplification"]["whole"]) for adapter in adapters]
    rows = [[name, *(_format_digits(found[key]) for key in keys)] for name, found in medians]
    return f"{title}\n{format_table(heading, rows)}"


def _format_digits(value: float | None) -> str:
    """Format a number with three significant digits."""
    return "-" if value is None else f"{value:#.3g}".rstrip(".")


def _format_overlaps(pairs: Sequence[Report]) -> str:
    title = "overlap, largest first"
    heading = ["", "cosine", "shared", "random", "inputs", "random", "outputs", "random", "most shared in"]
    notes = (
        "cosine of the deltas: 1 for the same change, 0 for unrelated ones, -1 for opposite ones",
        "shared: energy of each delta in the directions of the other, mean of both; adapters that share much interfere",
        "inputs, outputs: phi of all input or output directions, 100 % if one subspace contains the other",
    )
    rows = [[*_format_pair(pair), _find_strongest_block(pair)] for pair in pairs[:_MAX_PAIRS]]
    more = [f"and {len(pairs) - _MAX_PAIRS} more, which --json lists"] if len(pairs) > _MAX_PAIRS else []
    return "\n".join([title, format_table(heading, rows, left=(0, -1)), *more, *notes])


def _format_pair(pair: Report) -> list[str]:
    sides = [pair[side].get(key) for side in ("input", "output") for key in ("phi", "random_phi")]
    shares = [pair["shared"], pair["chance"], *sides]
    return [
        f"{_truncate_name(pair['first'])} + {_truncate_name(pair['second'])}",
        f"{pair['cosine']:z.3f}",
        *map(_format_percent, shares),
    ]


def _format_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _find_strongest_block(pair: Report) -> str:
    """Return the block with the most shared energy."""
    block, found = max(pair["blocks"].items(), key=lambda item: item[1]["shared"])
    return f"{block} {_format_percent(found['shared'])}"


def _format_overlap_by_block(pair: Report) -> str:
    title = "overlap by block; the last two columns are the energy of each delta in the directions of the other"
    heading = ["", "cosine", "shared", _truncate_name(pair["first"]), _truncate_name(pair["second"])]
    keys = ("shared", "first_share", "second_share")
    rows = [[b, f"{x['cosine']:z.3f}", *(_format_percent(x[key]) for key in keys)] for b, x in pair["blocks"].items()]
    return f"{title}\n{format_table(heading, rows)}"


def _format_left_out(adapters: Iterable[Report]) -> list[str]:
    """Format one line for each adapter and reason."""
    lines: list[str] = []
    for adapter in adapters:
        for reason in sorted(set(adapter["left_out"].values())):
            modules = [module for module, why in adapter["left_out"].items() if why == reason]
            lines.append(f"{adapter['name']}: {len(modules)} modules left out: {reason} (first: {modules[0]})")
    return ["\n".join(lines)] if lines else []


def _truncate_name(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
