"""Tables for the terminal, rendered by rich: headings in bold on a terminal, plain aligned text in pipes and files."""

import io
import sys
from collections.abc import Sequence

UNLIMITED = 10_000
"""Width of a table in characters, so that rich neither wraps nor shortens cells."""


def format_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Format rows as a table whose columns are as wide as their widest cell.

    Args:
        heading: Titles of the columns; empty for a table without a heading.
        rows: Cells, in one row per line; each row has as many cells as the heading.
        left: Indices of left-aligned columns, negative ones from the end; all others are right-aligned.

    Returns:
        The lines of the table, without colors and trailing blanks, so that `cut`, `awk` and `diff` can read them.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = len(heading or rows[0])
    aligned_left = {index % columns for index in left}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(heading), header_style="bold")
    for index in range(columns):
        title = Text(heading[index]) if heading else ""
        table.add_column(title, justify="left" if index in aligned_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = sys.stdout.isatty()
    colors = "standard" if terminal else None
    output = io.StringIO()
    Console(file=output, width=UNLIMITED, force_terminal=terminal, color_system=colors).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())
