"""`hf-radam average`: average saved checkpoints into one model."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from hf_radam.cli.main import add_command, exit_on_signals, table


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "average",
        run,
        description="Average the training weights of checkpoints of one run into a model folder for from_pretrained, "
        "tensor by tensor on the CPU, in float32. linear, cosine and 1-sqrt stand for a decay of the learning rate "
        "between the first and the last checkpoint, which should have been trained at a constant learning rate "
        "(arXiv:2507.17634). ewa is the average that --ewa would have kept of these checkpoints; uniform is the mean. "
        "Exit code 1 if a checkpoint is corrupted or the folder cannot be written.",
        examples=[
            "hf-radam average runs/constant/checkpoint-* --weights 1-sqrt -o runs/merged",
            "hf-radam average runs/constant/checkpoint-* --weights ewa --decay 0.998 -o runs/averaged",
            "hf-radam average runs/constant/checkpoint-* --weights uniform -o runs/mean",
        ],
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders checkpoint-N, in any order")
    kinds = ("uniform", "ewa", "linear", "cosine", "1-sqrt")
    parser.add_argument("--weights", required=True, choices=kinds, help="how much each checkpoint counts")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--decay", type=float, metavar="D", help="ewa: a fixed decay per step")
    parser.add_argument(
        "--half_life_ratio", type=float, metavar="R", help="ewa: half-life as a ratio of the steps so far (0.0625)"
    )


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """Return the output and the exit code; checkpoints that cannot be averaged are a `ValueError`."""
    from hf_radam.cli.merging import coefficients, merge, notes, read_sources

    exit_on_signals()
    weights, decay, ratio = arguments.weights, arguments.decay, arguments.half_life_ratio
    sources = read_sources(arguments.checkpoints)
    shares = coefficients([source.step for source in sources], weights=weights, decay=decay, half_life_ratio=ratio)
    merge(sources, shares, arguments.output, weights=weights)
    for note in notes(sources, weights=weights):
        print(f"hf-radam average: note: {note}", file=sys.stderr)
    rows = [["checkpoint", "step", "weight", "steps since the one before count"]]
    for source, share, before in zip(sources, shares, [0.0, *itertools.accumulate(shares)], strict=False):
        rows.append([str(source.path), str(source.step), f"{share:.4f}", f"{1 - before:.4f}" if before else "fully"])
    return "\n".join([*table(rows, right=(1, 2, 3)), "", f"written to {arguments.output}"]) + "\n", 0
