"""The command `hf-radam`: its parser, and what its commands share. A command's module is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_radam.checkpoints.manifest import CheckpointError

COMMANDS = {
    "inspect": "describe a checkpoint or a run, and how to resume, extend or evaluate it",
    "schedule": "print the schedule of a run, without training",
    "plot": "plot the losses and learning rates of runs",
    "average": "average saved checkpoints into one model",
    "consolidate": "join the sharded weights of a checkpoint into one model",
}

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Run = Callable[[argparse.Namespace], tuple[str, int]]
"""Run a command: its output and exit code. `CheckpointError` and `OSError` are of files, `ValueError` is bad input."""


def add_command(
    commands: Any, name: str, run: Run, *, description: str, examples: Sequence[str], **options: Any
) -> argparse.ArgumentParser:
    """Add the parser of a command to the result of `add_subparsers`; its help ends in the command lines `examples`."""
    width = min(shutil.get_terminal_size().columns, 110) - 2
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=COMMANDS[name],
        description="\n\n".join(textwrap.fill(text, width) for text in description.split("\n\n")),
        epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )
    parser.set_defaults(run=run, refuse=parser.error, prog=parser.prog)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command; a wrong one ends the process with exit code 2 (`SystemExit`)."""
    top = argparse.ArgumentParser(
        prog="hf-radam",
        description="Look at schedules, checkpoints and runs of RAdamTrainer, and make models from them.",
        epilog="hf-radam COMMAND --help describes a command, with examples.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        if argv and argv[0] == name:
            importlib.import_module(f"hf_radam.cli.{name}").add(commands)
        else:
            commands.add_parser(name, help=help)
    arguments, rest = top.parse_known_args(argv)
    if "training_flags" in arguments:
        arguments.training_flags = rest
    elif rest:
        arguments.refuse(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` are its arguments, by default those of the process.

    Returns:
        0; 1 if a checkpoint is corrupted, or a file cannot be read or written. A signal ends the process.
    """
    arguments = parse(sys.argv[1:] if argv is None else argv)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # C++ code that imports a module would abort on an exception
    try:
        output, code = arguments.run(arguments)
    except (CheckpointError, OSError) as error:
        print(printable(f"{arguments.prog}: {' '.join(str(error).split())}"), file=sys.stderr)
        return 1
    except ValueError as error:
        arguments.refuse(printable(" ".join(str(error).split())))
        raise  # not reached: `refuse` ends the process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without block characters shows ?
    try:
        sys.stdout.write(output)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`; Python must not flush again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def exit_on_signals() -> None:
    """Raise `SystemExit` on a signal from now on, so that what a command has begun is removed."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def folder(path: str) -> str:
    """Return the path of a folder for the output: as given, but absolute for `.` and `..`; a missing one is refused."""
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a folder. Give a checkpoint, checkpoint-N, or the folder of a run.")
    plain = os.path.normpath(path)
    return os.path.abspath(plain) if os.path.basename(plain) in (os.curdir, os.pardir) else plain


def printable(text: str) -> str:
    """Replace characters that would control a terminal, as file names may contain them."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Return rows as aligned lines; the columns numbered in `right` (from 0) are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.rjust(width) if n in right else c.ljust(width) for n, (c, width) in cells).rstrip())
    return lines
