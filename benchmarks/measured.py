"""Measured numbers: a JSON file of them, and tables made of them between two marks in documents.

<!-- KIND: NAME, written by `...` -->
...
<!-- end of KIND -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, Callable[[Any], str]]
"""What may stand between marks, by the name in the first of them: the text made of the numbers."""


def as_json(data: Any) -> str:
    """JSON with numbers that belong together in one line: lists of them, and objects with numbers for names."""
    text = json.dumps(data, indent=1)
    number = r"-?(?:[\d.]+(?:e[-+]?\d+)?|Infinity|NaN)"
    together = re.compile(rf'\[(\s*{number},?)+\s*\]|\{{(\s*"\d+": {number},?)+\s*\}}', re.IGNORECASE)

    def in_one_line(found: re.Match[str]) -> str:
        return re.sub(r"\s+", " ", found.group()).replace("[ ", "[").replace(" ]", "]")

    return together.sub(in_one_line, text) + "\n"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def names(text: str, kind: str) -> list[str]:
    """The names of the tables that a document's text has between marks of a kind."""
    return [match.group(2) for match in _marked(kind).finditer(text)]


def written(text: str, kind: str, parts: Parts, data: Any) -> str:
    """A document's text with what stands between its marks written anew.

    Raises:
        ValueError: if it has no such marks, or one of an unknown name.
    """
    found = names(text, kind)
    if not found:
        raise ValueError(f"There is no <!-- {kind}: NAME --> ... <!-- end of {kind} --> in it to write between.")
    for name in found:
        if name not in parts:
            raise ValueError(f"<!-- {kind}: {name} --> is none of {', '.join(parts)}.")
    return _marked(kind).sub(lambda match: match.group(1) + parts[match.group(2)](data) + match.group(4), text)


def write_document(path: Path, kind: str, parts: Parts, data: Any) -> None:
    """Write the tables into a document.

    Raises:
        ValueError: if there is no place for them in it.
    """
    try:
        text = written(path.read_text(encoding="utf-8"), kind, parts, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.write_text(text, encoding="utf-8")


def _marked(kind: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {kind}: (\w+)[^>]*-->\n)(.*?)(<!-- end of {kind} -->)", re.DOTALL)
