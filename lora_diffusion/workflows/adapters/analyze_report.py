"""What an analysis found, as aligned tables for the terminal."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_diffusion.core.tables import format_table

Facts = Mapping[str, Any]
MOST_PAIRS = 20


def describe_analysis(facts: Facts) -> str:
    """Format the facts of `analyze_files`: adapters, their blocks, amplification and overlap."""
    adapters, pairs = facts["adapters"], sorted(facts["pairs"], key=lambda pair: -pair["shared"])
    parts = [
        format_totals(adapters),
        format_by_block(
            adapters, "effective rank by block, medians over modules", lambda found: f"{found['effective_rank']:.1f}"
        ),
        format_by_block(
            adapters, "Frobenius norm by block, modules together", lambda found: format_digits(found["norm"])
        ),
    ]
    if facts["base"]:
        parts.append(format_amplifications(adapters, facts["base"]))
    if pairs:
        parts.append(format_overlaps(pairs))
    if len(pairs) == 1:
        parts.append(format_overlap_by_block(pairs[0]))
    return "\n\n".join([*parts, *format_left_out(adapters)])


def format_totals(adapters: Sequence[Facts]) -> str:
    heading = ["", "family", "kind", "modules", "norm", "rank", "effective", "stable", "for 99 %"]
    title = "deltas; ranks are medians over modules, the last one holds 99 % of the energy"
    return f"{title}\n{format_table(heading, [*map(format_total, adapters)], left=(0, 1, 2))}"


def format_total(adapter: Facts) -> list[str]:
    found = adapter["whole"]
    ranks = [f"{found['rank']:g}", f"{found['effective_rank']:.1f}", f"{found['stable_rank']:.1f}"]
    names = [truncate_name(adapter["name"]), adapter["family"], adapter["kind"]]
    return [*names, str(found["modules"]), format_digits(found["norm"]), *ranks, f"{found['rank_99']:g}"]


def format_by_block(adapters: Sequence[Facts], title: str, cell: Callable[[Facts], str]) -> str:
    """Format a table with a row for each block and a column for each adapter."""
    blocks = sorted({block for adapter in adapters for block in adapter["blocks"]})
    found = [adapter["blocks"] for adapter in adapters]
    rows = [[block, *(cell(each[block]) if block in each else "-" for each in found)] for block in blocks]
    heading = ["", *(truncate_name(adapter["name"], 12) for adapter in adapters)]
    return f"{title}\n{format_table(heading, rows)}"


def format_amplifications(adapters: Sequence[Facts], base: str) -> str:
    """Format medians over modules of the numbers of section 7.3 of LoRA [arXiv:2106.09685]."""
    keys = ("delta_norm", "projected", "own", "random", "factor")
    title = f"U'WV, what {base} holds in the delta's directions, in its own first ones, in random ones; medians"
    heading = ["", "|delta|", "|U'WV|", "own", "random", "|delta| / |U'WV|"]
    medians = [(truncate_name(adapter["name"]), adapter["amplification"]["whole"]) for adapter in adapters]
    rows = [[name, *(format_digits(found[key]) for key in keys)] for name, found in medians]
    return f"{title}\n{format_table(heading, rows)}"


def format_digits(value: float | None) -> str:
    """Format with three significant digits."""
    return "-" if value is None else f"{value:#.3g}".rstrip(".")


def format_overlaps(pairs: Sequence[Facts]) -> str:
    title = "overlap, most first"
    heading = ["", "cosine", "shared", "random", "inputs", "random", "outputs", "random", "most shared in"]
    notes = (
        "cosine of the deltas: 1 the same change, 0 unrelated, -1 opposite",
        "shared: energy of each in the other's input and output directions, mean of both: how much they will fight",
        "inputs, outputs: phi of all directions of one side, 100 % if the one's lie inside the other's",
    )
    rows = [[*format_pair(pair), find_strongest_block(pair)] for pair in pairs[:MOST_PAIRS]]
    more = [f"and {len(pairs) - MOST_PAIRS} more, which --json lists"] if len(pairs) > MOST_PAIRS else []
    return "\n".join([title, format_table(heading, rows, left=(0, -1)), *more, *notes])


def format_pair(pair: Facts) -> list[str]:
    sides = [pair[side].get(key) for side in ("input", "output") for key in ("phi", "random_phi")]
    shares = [pair["shared"], pair["chance"], *sides]
    return [
        f"{truncate_name(pair['first'])} + {truncate_name(pair['second'])}",
        f"{pair['cosine']:z.3f}",
        *map(format_percent, shares),
    ]


def format_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def find_strongest_block(pair: Facts) -> str:
    """Return the block with the most shared energy."""
    block, found = max(pair["blocks"].items(), key=lambda item: item[1]["shared"])
    return f"{block} {format_percent(found['shared'])}"


def format_overlap_by_block(pair: Facts) -> str:
    title = "overlap by block; the last two are each one's energy in the other's directions"
    heading = ["", "cosine", "shared", truncate_name(pair["first"]), truncate_name(pair["second"])]
    keys = ("shared", "first_share", "second_share")
    rows = [[b, f"{x['cosine']:z.3f}", *(format_percent(x[key]) for key in keys)] for b, x in pair["blocks"].items()]
    return f"{title}\n{format_table(heading, rows)}"


def format_left_out(adapters: Iterable[Facts]) -> list[str]:
    """Format one line for each adapter and reason."""
    lines: list[str] = []
    for adapter in adapters:
        for reason in sorted(set(adapter["left_out"].values())):
            modules = [module for module, why in adapter["left_out"].items() if why == reason]
            lines.append(f"{adapter['name']}: {len(modules)} modules left out, {reason} (first: {modules[0]})")
    return ["\n".join(lines)] if lines else []


def truncate_name(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
