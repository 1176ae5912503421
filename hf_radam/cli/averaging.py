"""`hf-radam average`: checkpoints merged into one model."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from hf_radam.cli.commands import add_command
from hf_radam.cli.drawing import table


def add(commands: Any) -> None:
    """Add the command."""
    from hf_radam.merging.coefficients import WEIGHTS

    parser = add_command(
        commands,
        "average",
        run,
        help="merge saved checkpoints into one model, with weights in the shape of a decay",
        description="Merge the training weights of checkpoints of one run into a model folder for from_pretrained, "
        "tensor by tensor on the CPU, in float32. linear, cosine and 1-sqrt stand for a decay of the learning rate "
        "over the updates from the first checkpoint to the last, which should have been trained at a constant one "
        "(arXiv:2507.17634); ewa is the average that --ewa would have kept of these checkpoints; uniform is the mean. "
        "Exit code 1 if a checkpoint is damaged or the folder cannot be written.",
        examples=[
            "hf-radam average runs/constant/checkpoint-* --weights 1-sqrt -o runs/merged",
            "hf-radam average runs/constant/checkpoint-* --weights ewa --decay 0.998 -o runs/averaged",
            "hf-radam average runs/constant/checkpoint-* --weights uniform --max_file_size 2GB -o runs/mean",
        ],
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders checkpoint-N, in any order")
    parser.add_argument("--weights", required=True, choices=WEIGHTS, help="how much each counts")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the model folder to make")
    parser.add_argument("--decay", type=float, metavar="D", help="with ewa: a fixed window, its decay per update")
    parser.add_argument(
        "--half_life_ratio",
        type=float,
        metavar="R",
        help="with ewa: a window that grows, its half-life as a ratio of the updates so far (0.0625)",
    )
    parser.add_argument(
        "--max_file_size", type=_bytes, metavar="SIZE", help="of a file of weights, held in memory (5GB)"
    )


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 500MB or 5GB") from None


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The output and the exit code.

    Raises:
        ValueError: if the checkpoints cannot be merged.
    """
    from hf_radam.checkpoints.manifest import CheckpointError
    from hf_radam.merging.folder import merge

    arguments.stop.begun = True
    try:
        done = merge(
            arguments.checkpoints,
            arguments.output,
            weights=arguments.weights,
            decay=arguments.decay,
            half_life_ratio=arguments.half_life_ratio,
            max_file_bytes=arguments.max_file_size,
        )
    except (CheckpointError, OSError) as error:
        arguments.stop.check()
        print(f"hf-radam average: {error}", file=sys.stderr)
        return "", 1
    for note in done.notes:
        print(f"hf-radam average: note: {note}", file=sys.stderr)
    names = [str(source.path) for source in done.sources]
    lines = report(names, [source.update for source in done.sources], done.coefficients)
    return "\n".join([*lines, "", f"written to {arguments.output}"]) + "\n", 0


def report(names: Sequence[str], updates: Sequence[int], coefficients: Sequence[float]) -> list[str]:
    """The table of what counts how much.

    Args:
        names: of the checkpoints.
        updates: at which they were saved.
        coefficients: how much each counts; what is left of them after one is by how much the updates up to the next
            one are multiplied.
    """
    done = list(itertools.accumulate(coefficients))
    rows = [["checkpoint", "update", "weight", "updates since the one before count"]]
    for index, (name, update, share) in enumerate(zip(names, updates, coefficients, strict=True)):
        rows.append([name, str(update), f"{share:.4f}", f"{1 - done[index - 1]:.4f}" if index else "fully"])
    return table(rows, right=(1, 2, 3))
