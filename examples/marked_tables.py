"""Tables in documents, written from measured numbers between two marks, so that a test can hold them to the numbers.

<!-- KIND: NAME, written by `...` -->
...
<!-- end of KIND -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, Callable[[Any], str]]
"""What may stand between marks, by the name in the first of them: the text made of the numbers."""


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
