"""Measured numbers in JSON files, and Markdown tables of them between two marks in documents.

<!-- KIND: NAME, written by `...` -->
...
<!-- end of KIND -->
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, Callable[[Any], str]]
"""What may stand between marks by its NAME: the text made of the numbers."""


def as_json(data: Any) -> str:
    """Write JSON with numbers that belong together on one line: lists, and objects with numbers for names."""
    number = r"-?(?:[\d.]+(?:e[-+]?\d+)?|Infinity|NaN)"
    together = re.compile(rf'\[(\s*{number},?)+\s*\]|\{{(\s*"\d+": {number},?)+\s*\}}', re.IGNORECASE)

    def on_one_line(found: re.Match[str]) -> str:
        return re.sub(r"\s+", " ", found.group()).replace("[ ", "[").replace(" ]", "]")

    return together.sub(on_one_line, json.dumps(data, indent=1)) + "\n"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Write a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `write` reads."""
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--from_json", type=Path, help="measure nothing, read the numbers from such a file")
    parser.add_argument("--document", type=Path, nargs="+", default=[], help="write tables between the marks in these")


def write(args: argparse.Namespace, kind: str, parts: Parts, data: Any, left_out: Collection[str] = ()) -> Any:
    """Print the tables; write the JSON file and the documents; return the data as they are read from JSON.

    Raises:
        ValueError: a document has no place for the tables.
    """
    text = as_json(data)
    data = json.loads(text)
    print("\n".join(part(data) for name, part in parts.items() if name not in left_out))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text, encoding="utf-8")
    for path in args.document:
        try:
            document = written(path.read_text(encoding="utf-8"), kind, parts, data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        path.write_text(document, encoding="utf-8")
    return data


def names(document: str, kind: str) -> list[str]:
    """List the names between the marks of a kind in a document."""
    return [match.group(2) for match in _marked(kind).finditer(document)]


def written(document: str, kind: str, parts: Parts, data: Any) -> str:
    """Replace what stands between the marks of a document.

    Raises:
        ValueError: there are no marks of this kind, or one has an unknown name.
    """
    found = names(document, kind)
    if not found:
        raise ValueError(f"There is no <!-- {kind}: NAME --> ... <!-- end of {kind} --> to write between.")
    for name in found:
        if name not in parts:
            raise ValueError(f"<!-- {kind}: {name} --> is unknown. Use one of {', '.join(parts)}.")
    return _marked(kind).sub(lambda match: match.group(1) + parts[match.group(2)](data) + match.group(4), document)


def _marked(kind: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {kind}: (\w+)[^>]*-->\n)(.*?)(<!-- end of {kind} -->)", re.DOTALL)
