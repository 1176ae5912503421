"""`hf-radam inspect`: what a checkpoint or a run holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from hf_radam.cli.commands import add_command, folder, printable


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        run,
        help="say what a checkpoint or a run holds, whether it is whole, and how to go on with it",
        description="Say what a checkpoint or the folder of a run holds, also one by stock Trainer: method, schedule, "
        "which weights, whether every file is whole, and how it can be resumed, extended or evaluated. Nothing is "
        "written, and nothing in the files is run. Exit code 1 if anything is damaged.",
        examples=["hf-radam inspect runs/wsd", "hf-radam inspect runs/wsd/checkpoint-18 --json"],
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or the folder of a run")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The output and the exit code.

    Raises:
        ValueError: for a folder that is neither a checkpoint nor a run.
    """
    # Here, so that `--help` need not load torch.
    from hf_radam.inspection.checkpoint import inspect_checkpoint
    from hf_radam.inspection.report import checkpoint_report, run_report
    from hf_radam.inspection.run import inspect_run, looks_like_checkpoint, looks_like_run
    from hf_radam.inspection.uses import uses

    path = folder(arguments.path)
    if looks_like_checkpoint(path):
        checkpoint = inspect_checkpoint(path)
        if arguments.json:
            can = {name: dataclasses.asdict(use) for name, use in uses(checkpoint).items()}
            return _json({"kind": "checkpoint", **dataclasses.asdict(checkpoint), "uses": can}), int(checkpoint.bad)
        return printable(checkpoint_report(checkpoint)), int(checkpoint.bad)
    if looks_like_run(path):
        found = inspect_run(path)
        code = int(bool(found.bad))
        if arguments.json:
            return _json({"kind": "run", **dataclasses.asdict(found), "damaged": found.bad}), code
        return printable(run_report(found)), code
    raise ValueError(f"{arguments.path} is neither a checkpoint nor a run: no checkpoint-N and no model is in it.")


def _json(content: dict[str, object]) -> str:
    return json.dumps(content, indent=2) + "\n"
