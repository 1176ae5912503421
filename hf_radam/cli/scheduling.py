"""`hf-radam schedule`: the schedule of a run before there is one."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from hf_radam.cli.commands import add_command, only_ascii
from hf_radam.cli.drawing import curve, table

if TYPE_CHECKING:
    from hf_radam.preview import Preview
    from hf_radam.training_args import RAdamTrainingArguments


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "schedule",
        run,
        help="print and draw the schedule of a run, without training",
        usage="hf-radam schedule [CONFIG] [--png FILE] [--flag value ...]",
        description="Say what the learning rate will be: ratios and counts resolved into updates, the phases as a "
        "table with the learning rates of their first and last update, the checkpoints that are kept for good, and the "
        "curve. For every scheduler, ours or upstream's, that does not follow the losses of the training.\n\n"
        "CONFIG is a file as examples/run_clm.py takes it (.yaml, .yml, .json; what it says of model and data is "
        "passed over), and the flags after it are those of RAdamTrainingArguments: they win over the file.",
        examples=[
            "hf-radam schedule configs/radam_wsd.yaml",
            "hf-radam schedule configs/radam_wsd.yaml --max_steps 5000 --decay_steps 0.1 --png schedule.png",
            "hf-radam schedule --optim radam --lr_scheduler_type wsd_s --max_steps 1000 --budgets 300 700",
            "hf-radam schedule --lr_scheduler_type cosine --warmup_steps 0.05 --max_steps 2000",
        ],
    )
    parser.add_argument("--png", metavar="FILE", help="draw it into this file too (needs matplotlib)")
    parser.set_defaults(training_flags=[])


def run(arguments: argparse.Namespace) -> tuple[str, int]:
    """The output and the exit code.

    Raises:
        ValueError: if the flags are no run whose schedule can be known.
    """
    plots = None
    if arguments.png is not None:
        plots = load_plots()
        plots.check_suffix(arguments.png, (".png",))
    args, passed_over = _training_arguments(arguments)
    from hf_radam.checkpoints.extension import extend
    from hf_radam.preview import preview

    extension = extend(args) if args.extend_from is not None else None
    resolved = preview(args, None if extension is None else extension.past)
    lines = [extension.words, ""] if extension is not None else []
    lines += report(resolved, args, width=shutil.get_terminal_size().columns, ascii_only=only_ascii())
    if passed_over:
        lines += ["", f"not about training, so passed over: {', '.join(passed_over)}"]
    if plots is not None:
        arguments.stop.begun = True
        plots.save_figure(plots.schedule_figure(resolved), arguments.png)
        lines += ["", f"drawn in {arguments.png}"]
    return "\n".join(lines) + "\n", 0


def load_plots() -> Any:
    """The module that draws.

    Raises:
        ValueError: without matplotlib.
    """
    try:
        from hf_radam import plots
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ValueError("drawing needs matplotlib: pip install 'hf_radam[plots]', or pip install matplotlib") from None
    return plots


def _training_arguments(arguments: argparse.Namespace) -> tuple[RAdamTrainingArguments, list[str]]:
    """The arguments of the run, and what the file says of other things."""
    from hf_radam.config_files import ConfigArgumentParser
    from hf_radam.training_args import RAdamTrainingArguments

    parser = ConfigArgumentParser([RAdamTrainingArguments], refuse=arguments.refuse, allow_other_keys=True)
    # The hardware that the run is for need not be here, and changes no learning rate.
    (args,) = parser.parse(arguments.training_flags, use_cpu=True, tf32=None, deepspeed=None, fsdp=None)
    return args, parser.other_keys


def report(resolved: Preview, args: RAdamTrainingArguments, *, width: int, ascii_only: bool) -> list[str]:
    """The schedule as lines of text.

    Args:
        resolved: the schedule.
        args: the arguments it comes from.
        width: of the terminal, in characters.
        ascii_only: whether it has no block characters.
    """
    from hf_radam.preview import describe_factors

    total = len(resolved.rates)
    with_kept = any(phase.kept for phase in resolved.phases)
    rows = [["phase", "updates", "share", "learning rate", *(["kept after it"] if with_kept else [])]]
    for phase in resolved.phases:
        share, rates = f"{100 * phase.updates / total:.1f} %", f"{phase.first_rate:.4g} to {phase.last_rate:.4g}"
        rates = f"{phase.first_rate:.4g}" if phase.first_rate == phase.last_rate else rates
        rows.append([phase.name, f"{phase.first}-{phase.last}", share, rates])
        rows[-1] += [phase.kept or ""] if with_kept else []
    lines = [resolved.words, "", *table(rows, right=(1, 2))]
    factors = describe_factors(resolved, args)
    for label, text in (("RAdam's factor", factors), ("average (EWA)", resolved.average)):
        if text is not None:
            lines += ["", *textwrap.wrap(text, width, initial_indent=label.ljust(16), subsequent_indent=" " * 16)]
    if resolved.warning is not None:
        lines += ["", *textwrap.wrap(f"Warning: {resolved.warning}", width)]
    return [*lines, "", *curve(resolved.rates, width=width, ascii_only=ascii_only)]
