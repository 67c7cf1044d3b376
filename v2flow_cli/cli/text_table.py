"""Tables as plain text that fit the terminal without cutting names or figures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

GAP = 2  # columns between columns


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Rows under their headings, the first column left-aligned, the others right-aligned.

    A table that is wider than ``width`` columns becomes several, one below the other, each with the first column and
    as many of the others as fit; where none fits beside the first, a line for each figure below the row's name. Nothing
    is cut. Default: the terminal's width, no limit where there is no terminal.
    """
    from rich.cells import cell_len

    width = terminal_width() if width is None else width
    widths = [max(map(cell_len, column)) for column in zip(heads, *rows)]
    if width and widths[0] + GAP + max(widths[1:], default=0) > width:
        return _records(heads, rows, width)
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for column in range(1, len(heads)):
        if blocks[-1] and width and used + GAP + widths[column] > width:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(column)
        used += GAP + widths[column]

    def line(cells: Sequence[str], block: Sequence[int]) -> str:
        first = cells[0] + " " * (widths[0] - cell_len(cells[0]))
        others = (" " * (GAP + widths[c] - cell_len(cells[c])) + cells[c] for c in block)
        return (first + "".join(others)).rstrip()

    tables = []
    for block in blocks:
        rule = "-" * (widths[0] + sum(GAP + widths[c] for c in block))
        tables.append("\n".join([line(heads, block), rule, *(line(row, block) for row in rows)]))
    return "\n\n".join(tables)


def _records(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Each row as lines: its name, then a heading and its figure in a line each; only one alone may be wider."""
    from rich.cells import cell_len

    lines: list[str] = []
    for row in rows:
        lines += [*([""] if lines else []), row[0]]
        for head, cell in zip(heads[1:], row[1:]):
            line = f"{' ' * GAP}{head}: {cell}"
            lines += [line] if cell_len(line) <= width else [f"{' ' * GAP}{head}:", cell]
    return "\n".join(lines)


def terminal_width() -> int:
    """Columns of the terminal, or of the variable COLUMNS; 0 if there is neither."""
    return shutil.get_terminal_size(fallback=(0, 0)).columns
