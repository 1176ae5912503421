"""What the commands have in common: help with examples, paths as they are shown, words for what goes wrong."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = Callable[[argparse.Namespace], tuple[str, int]]
"""Carries a command out: its output and its exit code. A `ValueError` in it is bad input, an `OSError` a bad path."""


def add_command(
    commands: Any, name: str, run: Run, *, help: str, description: str, examples: Sequence[str], **options: Any
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: what `add_subparsers` gave.
        name: the command's name.
        run: what carries it out.
        help: one line for the list of commands.
        description: all about it, for its own help.
        examples: command lines, which end that help.
        **options: for `ArgumentParser`.
    """
    width = min(shutil.get_terminal_size().columns, 110) - 2
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description="\n\n".join(textwrap.fill(text, width) for text in description.split("\n\n")),
        epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )
    parser.set_defaults(run=run, refuse=parser.error, prog=parser.prog)
    return parser


def folder(given: str) -> str:
    """The path of a folder as the output names it: as it was given, unless that is `.` or `..`.

    Raises:
        ValueError: if there is no such folder.
    """
    if not Path(given).is_dir():
        raise ValueError(f"{given} is no folder: give a checkpoint, checkpoint-N, or the folder of a run.")
    plain = os.path.normpath(given)
    return os.path.abspath(plain) if os.path.basename(plain) in ("", os.curdir, os.pardir) else plain


def printable(text: str) -> str:
    """The text without what would steer a terminal: some of it comes out of damaged files."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def only_ascii() -> bool:
    """Whether the output cannot show block characters."""
    try:
        "█░└".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False
