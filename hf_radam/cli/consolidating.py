"""`hf-radam consolidate`: sharded weights put together."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_radam.cli.commands import add_command, folder


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "consolidate",
        run,
        help="put sharded weights together, so that from_pretrained loads them",
        description="Write the weights that evaluation uses, which a checkpoint holds in shards (FSDP2 with sharded "
        "state dicts, ZeRO-3 that does not gather), whole into the same folder, file by file. Prints that folder. "
        "Exit code 1 if the checkpoint is damaged or cannot be written to.",
        examples=[
            "hf-radam consolidate runs/wsd/checkpoint-18",
            "hf-radam consolidate runs/wsd --training_weights",
        ],
    )
    parser.add_argument(
        "path", metavar="PATH", help="a checkpoint, checkpoint-N, or the folder of a run, of which it takes the newest"
    )
    parser.add_argument(
        "--training_weights", action="store_true", help="write those that train instead, at the checkpoint's root"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code of a model that brings its own")


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The output and the exit code.

    Raises:
        ValueError: for a folder that is neither a checkpoint nor a run.
    """
    from hf_radam.checkpoints.loading import is_checkpoint, newest_loadable_checkpoint
    from hf_radam.checkpoints.models.consolidation import consolidate
    from hf_radam.checkpoints.runs import list_checkpoints

    path = folder(arguments.path)
    if not is_checkpoint(path) and not list_checkpoints(path):
        raise ValueError(f"{arguments.path} is neither a checkpoint nor a run: no checkpoint-N and no model is in it.")
    arguments.stop.begun = True
    try:
        path = path if is_checkpoint(path) else str(newest_loadable_checkpoint(path))
        trust = arguments.trust_remote_code or None
        return f"{consolidate(path, training_weights=arguments.training_weights, trust_remote_code=trust)}\n", 0
    except (OSError, ValueError) as error:
        arguments.stop.check()
        print(f"hf-radam consolidate: {error}", file=sys.stderr)
        return "", 1
