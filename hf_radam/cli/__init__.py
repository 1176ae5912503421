"""The command `hf-radam`: a module for each of its commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_radam.cli import averaging, consolidate, inspecting, plotting, schedule
from hf_radam.cli.commands import printable
from hf_radam.cli.stopping import Stop


def parser() -> argparse.ArgumentParser:
    """What the command takes, but for the flags that `schedule` hands on."""
    top = argparse.ArgumentParser(
        prog="hf-radam",
        description="Look into schedules, checkpoints and runs of RAdamTrainer, and make models of them.",
        epilog="hf-radam COMMAND --help says what a command takes, with examples.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (inspecting, schedule, plotting, averaging, consolidate):
        command.add(commands)
    return top


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command; a wrong one leaves the process with 2 (`SystemExit`).

    Args:
        argv: those of the process when not given.
    """
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if "training_flags" in arguments:
        arguments.training_flags = rest
    elif rest:
        arguments.refuse(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process when not given.

    Returns:
        0; 1 if anything is damaged; 128 and the number of the signal that ended it (Ctrl-C: 130, SIGTERM: 143). A
        wrong argument leaves the process with 2 (`SystemExit`).
    """
    with Stop("hf-radam") as stop:
        try:
            arguments = parse(argv)
            arguments.stop, stop.command = stop, arguments.prog
            return _run(arguments)
        except BaseException:
            if stop.signal is None:
                raise
            stop.tell()  # whatever a signal's exception has become on its way, this is what happened
            return stop.code


def _run(arguments: argparse.Namespace) -> int:
    try:
        output, code = arguments.run(arguments)
    except ValueError as error:
        arguments.stop.check()
        arguments.refuse(printable(" ".join(str(error).split())))
        raise  # not reached: it ends the process
    except OSError as error:
        arguments.stop.check()
        arguments.refuse(f"a file cannot be read or written: {error}")
        raise
    try:
        sys.stdout.write(output)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough; nor is Python to try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)
