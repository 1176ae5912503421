"""`hf-radam consolidate`: write weights that lie in shards as files that `from_pretrained` loads."""

from __future__ import annotations

import argparse
from typing import Any

from hf_radam.cli.main import add_command, exit_on_signals, folder


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "consolidate",
        run,
        description="Write the weights that evaluation used, which a checkpoint holds in shards (FSDP2 with sharded "
        "state dicts, ZeRO-3 that does not gather), as files into the same folder. Prints that folder. Exit code 1 if "
        "the checkpoint is corrupted or cannot be written to.",
        examples=["hf-radam consolidate runs/wsd/checkpoint-18", "hf-radam consolidate runs/wsd --training_weights"],
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, checkpoint-N, or a run, whose newest one is taken")
    parser.add_argument(
        "--training_weights", action="store_true", help="write the training weights, at the checkpoint's root, instead"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the custom code of a model")


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """Return the output and the exit code.

    Raises:
        ValueError: for a folder that is neither a checkpoint nor a run.
    """
    from hf_radam.checkpoints.load import consolidate, is_checkpoint, newest_loadable_checkpoint
    from hf_radam.checkpoints.runs import list_checkpoints

    path = folder(arguments.path)
    if not is_checkpoint(path) and not list_checkpoints(path):
        raise ValueError(f"{arguments.path} is neither a checkpoint nor a run: no checkpoint-N and no model is in it.")
    exit_on_signals()
    path = path if is_checkpoint(path) else str(newest_loadable_checkpoint(path))
    trust = arguments.trust_remote_code or None
    return f"{consolidate(path, training_weights=arguments.training_weights, trust_remote_code=trust)}\n", 0
