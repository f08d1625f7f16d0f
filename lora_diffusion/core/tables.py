"""Tables for the terminal: headings in bold on a terminal, plain aligned text in pipes and files."""

import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest


def format_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Format rows as a table whose columns are as wide as their widest cell.

    Args:
        heading: Titles of the columns; empty for a table without a heading.
        rows: Cells, in one row per line; each row has as many cells as the heading. A cell with line breaks takes
            several lines.
        left: Indices of left-aligned columns, negative ones from the end; all others are right-aligned.

    Returns:
        The lines of the table, without colors and trailing blanks, so that `cut`, `awk` and `diff` can read them.
    """
    # Only the widths of characters are rich's: its own Table takes seconds for a library of thousands of adapters.
    from rich.cells import cell_len

    lines = [*([tuple(heading)] if heading else []), *(line for row in rows for line in _split_lines(row))]
    if not lines:
        return ""
    columns = len(lines[0])
    widths = [max(cell_len(line[index]) for line in lines) for index in range(columns)]
    aligned_left = {index % columns for index in left}

    def align(index: int, cell: str) -> str:
        padding = " " * (widths[index] - cell_len(cell))
        return cell + padding if index in aligned_left else padding + cell

    formatted = ["  ".join(align(index, cell) for index, cell in enumerate(line)).rstrip() for line in lines]
    if heading and sys.stdout.isatty():
        formatted[0] = f"\x1b[1m{formatted[0]}\x1b[0m"
    return "\n".join(formatted)


def _split_lines(row: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of a row, of which there are several if a cell contains line breaks; drop control codes."""
    from rich.control import strip_control_codes

    return zip_longest(*(map(strip_control_codes, cell.splitlines() or [""]) for cell in row), fillvalue="")
