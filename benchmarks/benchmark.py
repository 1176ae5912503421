"""What updates, averages and whole trainings cost, side by side: ours, torch's, stock Trainer's and other packages'.

    python benchmarks/benchmark.py --json runs/benchmark.json --figure runs/benchmark.png

All of one table run in turns in one process, round after round in other orders; a number is the median of its rounds.
The limit is what the same bytes take in one pass, at the bandwidth of a plain `lerp_` measured in the same rounds.
Packages that are not installed are left out; `make benchmark` makes an environment that has them. The measuring is in
`benchmarking/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import hf_radam
import measured
from benchmarking import figure, memory, report, rows, timing

QUICK: dict[str, Any] = {
    "parameters": 0.6,
    "sizes": [0.6, 2.0],
    "rounds": 3,
    "every": [1, 4],
    "trainer_parameters": 0.6,
    "batches": [1],
    "block": 16,
    "updates": 3,
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    many: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    parser.add_argument("--parameters", type=float, default=34.0, help="millions: the size at which all rows run")
    parser.add_argument(
        "--sizes", type=float, default=[8.0, 34.0, 100.0], help="millions: sizes for the growth", **many
    )
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each table")
    parser.add_argument("--every", type=int, default=[1, 4, 16, 64], help="intervals of averaging", **many)
    parser.add_argument("--trainer_parameters", type=float, default=8.0, help="millions, of the model that is trained")
    parser.add_argument("--batches", type=int, default=[1, 4], help="sequences of an update of the trainers", **many)
    parser.add_argument("--block", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--updates", type=int, default=200, help="updates of each training that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: the numbers mean nothing")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--from_json", type=Path, help="measure nothing, read the numbers of such a file")
    parser.add_argument("--figure", type=Path, help="draw them into this file, .png or .svg")
    parser.add_argument("--document", type=Path, nargs="+", default=[], help="write tables between the marks in these")
    if "--quick" in (sys.argv[1:] if words is None else words):
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args(words)
    if arguments.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error('--figure needs matplotlib: pip install -e ".[plots]"')
    if any(max(arguments.every) % interval for interval in arguments.every):
        parser.error(f"--every {arguments.every}: the largest must be a multiple of each.")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, for JSON; what is done is told on the way."""
    from benchmarking import trainers

    device = torch.device(arguments.device)
    tables = []
    for millions in sorted({*arguments.sizes, arguments.parameters}):
        for what in rows.ROWS:
            say(f"{what} of {millions:g} million parameters")
            growing = millions != arguments.parameters
            shapes = rows.shapes(millions)
            tables.append(timing.table(what, shapes, device, rounds=arguments.rounds, growing=growing))
    say("averaging at intervals")
    sizes = rows.shapes(arguments.parameters)
    every = timing.intervals(sizes, device, every=arguments.every, rounds=max(1, arguments.rounds // 3))
    taken = []
    if memory.measurable(device):
        say("memory, in a process for each row")
        taken = [memory.table(what, arguments.parameters, device) for what in rows.ROWS]
    else:
        say("memory is not measured: this system has no /proc/self/clear_refs")
    trained = []
    for batch in arguments.batches:
        say(f"trainings with {batch} x {arguments.block} tokens an update")
        trained.append(
            trainers.compare(
                arguments.trainer_parameters,
                batch=batch,
                block=arguments.block,
                updates=arguments.updates,
                device=device,
            )
        )
    return {
        "machine": machine(device),
        "versions": versions(),
        "rounds": arguments.rounds,
        "tables": tables,
        "every": every,
        "memory": taken,
        "trainers": trained,
    }


def say(text: str) -> None:
    """Tell what comes next, beside the tables."""
    print(f"... {text}", file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = named[0].split(":", 1)[1].strip() if named else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"processor": processor, "cores": cores, "threads": torch.get_num_threads(), "device": name}


def versions() -> dict[str, str]:
    """Versions of what was measured, and of Python."""
    packages = ("torch", "transformers", "accelerate", "schedulefree", *rows.PEERS)
    found = {package: rows.version(package) for package in packages}
    own = {"Python": platform.python_version(), "hf_radam": hf_radam.__version__}
    return own | {name: number for name, number in found.items() if number}


def main() -> int:
    """Measure or read, then print, write and draw."""
    arguments = parse_arguments()
    if arguments.from_json:
        data = json.loads(arguments.from_json.read_text(encoding="utf-8"))
    else:
        data = measure(arguments)
    print(report.whole(data))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(measured.as_json(data), encoding="utf-8")
    if arguments.figure:
        figure.draw(data, arguments.figure)
    for document in arguments.document:
        measured.write_document(document, "benchmark", report.PARTS, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
