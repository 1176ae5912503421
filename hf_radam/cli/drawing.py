"""Tables and curves in plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS, RANGE = " ▁▂▃▄▅▆▇█", "░"
ASCII_BLOCKS, ASCII_RANGE = "    :####", "."
EIGHTHS = 8  # of a character cell


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Rows as lines, the columns two blanks apart; those numbered in `right` (from 0) are flush with the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def curve(values: Sequence[float], *, width: int, height: int = 8, ascii_only: bool = False) -> list[str]:
    """A curve of one value for each update as an area over zero, with its scale on the left and below.

    A column stands for as many updates as it must; where they differ by more than a row, it is filled solidly up to
    the lowest and lightly up to the highest, so that nothing short of a column is lost.

    Args:
        values: one for each update, 0 or more.
        width: characters of a line, 20 or more.
        height: lines of the area.
        ascii_only: for terminals that have nothing else.
    """
    blocks, light = (ASCII_BLOCKS, ASCII_RANGE) if ascii_only else (BLOCKS, RANGE)
    corner, side, below = ("+", "|", "-") if ascii_only else ("└", "┤", "─")
    top = max(values)
    labels = [f"{top:g}", "0"]
    margin = max(map(len, labels))
    columns = max(width - margin - 1, 10)
    scale = EIGHTHS * height / top if top else 0.0
    edges = [column * len(values) // columns for column in range(columns + 1)]
    parts = [values[start : max(end, start + 1)] for start, end in zip(edges, edges[1:], strict=False)]
    spans = [(scale * min(part), scale * max(part), scale * math.fsum(part) / len(part)) for part in parts]
    lines = []
    for row in range(height - 1, -1, -1):
        label = labels[0] if row == height - 1 else ""
        cells = "".join(_cell(span, EIGHTHS * row, blocks, light) for span in spans)
        lines.append(f"{label.rjust(margin)}{side}{cells}".rstrip())
    lines.append(f"{'0'.rjust(margin)}{corner}{below * columns}")
    lines.append(" " * (margin + 1) + _scale_below(len(values), columns))
    return lines


def _cell(span: tuple[float, float, float], base: int, blocks: str, light: str) -> str:
    """The character of a column in the row that begins `base` eighths above zero."""
    low, high, mean = span
    solid = round(mean if high - low <= EIGHTHS else low) - base
    if solid >= EIGHTHS:
        return blocks[-1]
    if high - low > EIGHTHS and round(high) > base:
        return light
    return blocks[max(solid, 0)]


def _scale_below(count: int, columns: int) -> str:
    """The numbers of the first and the last update under their columns, and of a middle one where there is room."""
    line = [" "] * columns
    middle = f"update {max(count // 2, 1)}"
    for text, at in (("1", 0), (str(count), columns - len(str(count))), (middle, columns // 2 - len(middle) // 2)):
        if all(cell == " " for cell in line[max(at - 1, 0) : at + len(text) + 1]):
            line[at : at + len(text)] = text
    return "".join(line).rstrip()
