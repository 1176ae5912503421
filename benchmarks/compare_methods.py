"""Compare AdamW with a cosine and five ways of RAdam at three horizons, on the source of the Python standard library.

    python benchmarks/compare_methods.py --quick    # 8 minutes on 2 CPU cores: to see that it runs
    python benchmarks/compare_methods.py            # 100 minutes

It may be stopped at any time: the same command goes on with what is missing. Every training is one command of
`run_clm.py`. Each method is tuned on a grid that grows until the best is not at an end: learning rate, and of AdamW the
warm-up too. Then it has three seeds. The parts are in `comparing/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measured
from comparing import figures, report, results
from comparing.planning import NoBestRate
from comparing.running import JobError, Runner, Stopped
from comparing.settings import QUICK, Settings

KIND = "comparison"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; `settings` is made of it.

    Every field of `Settings` but the grids is a flag; `--rates ARM RATE RATE RATE` begins a grid elsewhere.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--folder", type=Path, help="where the trainings lie; default: runs/compare, or runs/quick")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one seed: the numbers mean nothing")
    parser.add_argument("--workers", type=int, help="trainings at a time; default: one for each core, one on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument(
        "--json", type=Path, help="write every number to this file; default: results.json in the folder"
    )
    parser.add_argument("--from_json", type=Path, help="train nothing, read the numbers of such a file")
    parser.add_argument("--figures", type=Path, help="folder for the figures; default: the folder of the trainings")
    parser.add_argument("--document", type=Path, nargs="+", default=[], help="write tables between the marks in these")
    parser.add_argument(
        "--rates", nargs="+", action="append", default=[], metavar="ARM RATE", help="adamw, radam or radam_schedulefree"
    )
    for field in dataclasses.fields(Settings):
        if field.name == "seeds":
            parser.add_argument("--seeds", type=int, nargs="+", help="the first chooses the learning rates")
        elif field.name == "bf16":
            parser.add_argument("--bf16", action="store_true", default=None, help="compute in bf16")
        elif field.name == "train_file":
            parser.add_argument("--train_file", type=os.path.abspath, help="default: the Python standard library")
        elif field.name != "rates":
            kind: Any = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, help=f"default: {field.default}")
    arguments = parser.parse_args(words)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error('the figures need matplotlib: pip install -e ".[plots]"')
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings) if f.name != "rates"}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "seeds" in changes:
        changes["seeds"] = tuple(changes["seeds"])
    base = QUICK if arguments.quick else Settings()
    try:
        own = {arm: tuple(sorted(map(float, rates))) for arm, *rates in arguments.rates}
        if own.keys() - base.rates.keys():
            raise ValueError(f"--rates wants one of {', '.join(base.rates)} and learning rates.")
        arguments.settings = dataclasses.replace(base, **changes, rates=base.rates | own)
    except ValueError as error:
        parser.error(str(error))
    if arguments.folder is None:
        arguments.folder = Path("runs/quick" if arguments.quick else "runs/compare")
    if arguments.workers is None:
        arguments.workers = cores if arguments.settings.device == "cpu" else 1
    if min(arguments.workers, arguments.threads) < 1:
        parser.error("--workers and --threads must be at least 1.")
    return arguments


def keep_settings(settings: Settings, folder: Path) -> None:
    """Write down what is compared in a folder, so that no other comparison goes on with its trainings.

    Raises:
        ValueError: if the folder has trainings of another comparison; more learning rates and seeds are none.
    """
    path = folder / "settings.json"
    own = json.loads(json.dumps(settings.as_json()))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in (name for name in own if name not in ("rates", "seeds")):
            if own[name] != before.get(name):
                raise ValueError(f"{folder} holds a comparison with {name}={before.get(name)}: give another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)  # whole, or as it was


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context in which no other comparison trains in a folder.

    Raises:
        ValueError: if one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another comparison is being made in {folder}: wait for it.") from None
        yield


def main() -> int:
    """Train what is missing, then print, write and draw."""
    arguments = parse_arguments()
    if arguments.from_json:
        found = json.loads(arguments.from_json.read_text(encoding="utf-8"))
    else:
        folder = arguments.folder.absolute()
        runner = Runner(arguments.settings, folder, arguments.workers, arguments.threads)

        def stop(*_: Any) -> None:
            runner.stopping = True

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        try:
            with alone(folder):
                keep_settings(arguments.settings, folder)
                found = results.collect(arguments.settings, runner.run(), folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        except (JobError, NoBestRate) as error:
            print(error, file=sys.stderr)
            return 1
        except Stopped:
            print("Stopped; what is finished stays. The same command goes on from there.", file=sys.stderr)
            return 130
        text = measured.as_json(found)
        path = arguments.json or arguments.folder / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        found = json.loads(text)  # as it will be read again
    print(report.whole(found))
    figures.draw(found, arguments.figures or arguments.folder)
    for document in arguments.document:
        measured.write_document(document, KIND, report.PARTS, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
