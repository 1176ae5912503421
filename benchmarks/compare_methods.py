"""Compare AdamW with a cosine and five ways of RAdam at three horizons, on the source of the Python standard library.

    python benchmarks/compare_methods.py --quick    # 8 minutes on 2 CPU cores: to see that it runs
    python benchmarks/compare_methods.py            # 100 minutes

It may be stopped at any time: the same command resumes with what is missing. Every training is one command of
`run_clm.py`. The learning rate of each method, and AdamW's warm-up, is tuned on a grid that grows until the best is not
at an end; then every seed is trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import compare_figures
import compare_results
import tables
from compare_plan import QUICK, NoBestRate, Settings
from compare_run import JobError, Runner, Stopped


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line into flags and `settings`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="folder of the trainings; default: runs/compare or runs/quick")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one seed: the numbers mean nothing")
    parser.add_argument("--settings", type=json.loads, default={}, help="other values of `Settings`, as JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--figures", type=Path, help="folder of the figures; default: that of the trainings")
    tables.add_flags(parser)
    arguments = parser.parse_args(argv)
    try:
        arguments.settings = dataclasses.replace(QUICK if arguments.quick else Settings(), **arguments.settings)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} must be at least 1.")
    arguments.folder = arguments.folder or Path("runs/quick" if arguments.quick else "runs/compare")
    return arguments


def run(arguments: argparse.Namespace) -> compare_results.Results:
    """Train what is missing, and collect the results.

    Raises:
        JobError: another comparison runs in this folder, or a training fails.
    """
    folder = (arguments.folder / arguments.settings.digest).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments.settings, folder, arguments.workers)

    def stop(*_: Any) -> None:
        runner.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(f"Another comparison runs in {folder}. Wait for it.") from None
        return compare_results.collect(arguments.settings, runner.run(), folder)


def main() -> int:
    """Train or read, then print, write and draw."""
    arguments = parse_arguments()
    try:
        found = json.loads(arguments.from_json.read_text("utf-8")) if arguments.from_json else run(arguments)
    except (JobError, NoBestRate) as error:
        print(error, file=sys.stderr)
        return 1
    except Stopped:
        print("Stopped. The same command resumes with what is missing.", file=sys.stderr)
        return 130
    if not arguments.from_json:
        arguments.json = arguments.json or arguments.folder / "results.json"
    results = tables.write(arguments, "comparison", compare_results.PARTS, found)
    compare_figures.draw(results, arguments.figures or arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
