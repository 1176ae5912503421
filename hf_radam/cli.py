"""The command `hf-radam`: look into checkpoints and runs (`inspect`), put sharded weights together (`consolidate`)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    top = argparse.ArgumentParser(prog="hf-radam", description="Look into checkpoints and runs of RAdamTrainer.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint or a run holds, whether it is whole, and how to go on with it",
        description="Say what a checkpoint or the folder of a run holds, also one by stock Trainer: method, schedule, "
        "which weights, whether every file is whole, and how it can be resumed, extended or evaluated. Nothing is "
        "written, and nothing in the files is run. Exit code 1 if anything is damaged.",
    )
    inspect.add_argument("path", metavar="PATH", help="a checkpoint, or the folder of a run")
    inspect.add_argument("--json", action="store_true", help="print the facts as JSON")
    inspect.set_defaults(refuse=inspect.error, run=_inspect)
    consolidate = commands.add_parser(
        "consolidate",
        help="put sharded weights together, so that from_pretrained loads them",
        description="Write the weights that evaluation uses, which a checkpoint holds in shards (FSDP2 with sharded "
        "state dicts, ZeRO-3 that does not gather), whole into the same folder, file by file. Prints that folder. "
        "Exit code 1 if the checkpoint is damaged or cannot be written to.",
    )
    consolidate.add_argument(
        "path", metavar="PATH", help="a checkpoint, checkpoint-N, or the folder of a run, of which it takes the newest"
    )
    consolidate.add_argument(
        "--training_weights", action="store_true", help="write those that train instead, at the checkpoint's root"
    )
    consolidate.add_argument(
        "--trust_remote_code", action="store_true", help="run the code of a model that brings its own"
    )
    consolidate.set_defaults(refuse=consolidate.error, run=_consolidate)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process when not given.

    Returns:
        0; 1 if anything is damaged. A wrong argument leaves the process with 2 (`SystemExit`).
    """
    arguments = parser().parse_args(argv)
    path = _shown(arguments.path)
    if not Path(path).is_dir():
        arguments.refuse(f"{arguments.path} is no folder: give a checkpoint, checkpoint-N, or the folder of a run.")
    try:
        output, code = arguments.run(path, arguments)
    except OSError as error:
        arguments.refuse(f"{arguments.path} cannot be read: {error}")
        raise  # not reached: it ends the process
    if output is None:
        arguments.refuse(f"{arguments.path} is neither a checkpoint nor a run: no checkpoint-N and no model is in it.")
    else:
        sys.stdout.write(output)
    return code


def _shown(path: str) -> str:
    """The path as the commands in the output name it: as it was given, unless that is `.` or `..`."""
    plain = os.path.normpath(path)
    return os.path.abspath(plain) if os.path.basename(plain) in ("", os.curdir, os.pardir) else plain


def _consolidate(path: str, arguments: argparse.Namespace) -> tuple[str | None, int]:
    """The output and the exit code, or None for a folder that is no checkpoint."""
    from hf_radam.checkpoints.loading import is_checkpoint, newest_checkpoint
    from hf_radam.checkpoints.models.consolidation import consolidate
    from hf_radam.checkpoints.runs import checkpoints

    if not is_checkpoint(path) and not checkpoints(path):
        return None, 2
    try:
        path = path if is_checkpoint(path) else str(newest_checkpoint(path))
        trust = arguments.trust_remote_code or None
        return f"{consolidate(path, training_weights=arguments.training_weights, trust_remote_code=trust)}\n", 0
    except (OSError, ValueError) as error:
        print(f"hf-radam consolidate: {error}", file=sys.stderr)
        return "", 1


def _inspect(path: str, arguments: argparse.Namespace) -> tuple[str | None, int]:
    """The output and the exit code, or None for a folder that is neither a checkpoint nor a run."""
    # Here, so that `--help` need not load torch.
    from hf_radam.inspection.checkpoint import inspect_checkpoint
    from hf_radam.inspection.report import checkpoint_report, run_report
    from hf_radam.inspection.run import inspect_run, looks_like_checkpoint, looks_like_run
    from hf_radam.inspection.uses import uses

    if looks_like_checkpoint(path):
        checkpoint = inspect_checkpoint(path)
        if arguments.json:
            can = {name: dataclasses.asdict(use) for name, use in uses(checkpoint).items()}
            return _json({"kind": "checkpoint", **dataclasses.asdict(checkpoint), "uses": can}), int(checkpoint.bad)
        return _printable(checkpoint_report(checkpoint)), int(checkpoint.bad)
    if looks_like_run(path):
        run = inspect_run(path)
        code = int(bool(run.bad))
        if arguments.json:
            return _json({"kind": "run", **dataclasses.asdict(run), "damaged": run.bad}), code
        return _printable(run_report(run)), code
    return None, 2


def _json(content: dict[str, object]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _printable(text: str) -> str:
    """The text without what would steer a terminal: some of it comes out of damaged files."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


if __name__ == "__main__":
    sys.exit(main())
