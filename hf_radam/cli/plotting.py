"""`hf-radam plot`: what runs have logged."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_radam.cli.commands import add_command, folder, printable
from hf_radam.cli.drawing import table
from hf_radam.cli.schedule import load_plots

if TYPE_CHECKING:
    from hf_radam.training_logs import Series, TrainingLog


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plot",
        run,
        help="draw the losses and learning rates of runs",
        description="Draw training loss, losses of evaluations (of the average and of the training weights, where both "
        "were taken) and learning rate of one or several runs, also of stock Trainer, as their trainer_state.json has "
        "them. Of a run it is the one that has seen most updates, at its root or in its newest checkpoint. Needs "
        "matplotlib.",
        examples=[
            "hf-radam plot runs/wsd -o wsd.png",
            "hf-radam plot runs/wsd runs/constant -o both.png --log_x",
            "hf-radam plot runs/wsd/checkpoint-18 -o until_18.pdf --half_life 0",
        ],
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or a checkpoint")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a .png, .pdf or .svg file")
    parser.add_argument("--log_x", action="store_true", help="draw the updates on a logarithmic axis")
    parser.add_argument(
        "--half_life",
        type=float,
        metavar="RATIO",
        help="smooth the training loss with this half-life, a ratio of the updates so far (0.02); 0 does not",
    )


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The output and the exit code.

    Raises:
        ValueError: if a run has logged no loss.
    """
    plots = load_plots()
    plots.check_suffix(arguments.output)
    from hf_radam.training_logs import read_training_log

    logs = [read_training_log(folder(path)) for path in arguments.runs]
    options = {} if arguments.half_life is None else {"half_life_ratio": arguments.half_life}
    arguments.stop.begun = True
    plots.save_figure(plots.runs_figure(logs, logarithmic=arguments.log_x, **options), arguments.output)
    lines = report(logs, plots.labels([log.path for log in logs]))
    return printable("\n".join([*lines, "", f"drawn in {arguments.output}"]) + "\n"), 0


def report(logs: Sequence[TrainingLog], names: Sequence[str]) -> list[str]:
    """A table with the last values of each run."""
    kinds = list(dict.fromkeys(kind for log in logs for kind in log.evaluations))
    rows = [["run", "updates", "training loss", *kinds, "from"]]
    for log, name in zip(logs, names, strict=True):
        last = [_last(log.loss), *(_last(log.evaluations.get(kind)) for kind in kinds)]
        rows.append([name, str(log.update), *last, str(log.source)])
    return table(rows, right=range(1, len(rows[0]) - 1))


def _last(series: Series | None) -> str:
    if not series:
        return "-"
    value = series.values[-1]
    return f"{value:.4f}" if math.isfinite(value) else str(value)
