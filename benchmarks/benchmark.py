"""Time optimizer steps, averages and whole trainings beside torch's, stock Trainer's and other packages'.

    python benchmarks/benchmark.py --json runs/benchmark.json --figure runs/benchmark.png

Numbers are medians of rounds in turns. The limit is the time of the same bytes in one pass, at the bandwidth of a plain
`lerp_` in the same rounds. Packages that are not installed are left out; `make benchmark` installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import benchmark_report
import benchmark_rows as rows
import hf_radam
import tables

SETTINGS: dict[str, Any] = {
    "width": 576,  # of the llama with whose parameters all rows run
    "widths": [256, 576, 960],  # for the growth
    "rounds": 21,
    "every": [1, 4, 16, 64],  # intervals of averaging
    "trainers": {"width": 256, "batches": [1, 4], "block": 128, "steps": 200},
}
QUICK: dict[str, Any] = {
    "width": 64,
    "widths": [64, 128],
    "rounds": 3,
    "every": [1, 4],
    "trainers": {"width": 64, "batches": [1], "block": 16, "steps": 3},
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: the numbers mean nothing")
    tables.add_flags(parser)
    parser.add_argument("--figure", type=Path, help="draw the figure into this file, .png or .svg")
    return parser.parse_args(argv)


def measure(settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Measure everything, for JSON."""
    from benchmark_trainers import time_trainers

    measured: list[dict[str, Any]] = []
    for width in sorted({*settings["widths"], settings["width"]}):
        for what in rows.ROWS:
            log(f"{what} of a llama of width {width}")
            growing, shapes = width != settings["width"], rows.shapes_of(width)
            measured.append(rows.time_table(what, shapes, device, rounds=settings["rounds"], growing=growing))
    log("averaging at intervals")
    shapes, rounds = rows.shapes_of(settings["width"]), max(1, settings["rounds"] // 3)
    every = rows.time_intervals(shapes, device, every=settings["every"], rounds=rounds)
    memory = []
    if rows.has_memory(device):
        log("memory, in a process for each row")
        memory = [rows.memory_table(what, settings["width"], device) for what in rows.ROWS]
    log("trainings")
    options = dict(settings["trainers"])
    trained = [time_trainers(batch=batch, device=device, **options) for batch in options.pop("batches")]
    return {
        "machine": machine(device),
        "versions": versions(),
        "rounds": settings["rounds"],
        "tables": measured,
        "every": every,
        "memory": memory,
        "trainers": trained,
    }


def log(text: str) -> None:
    """Print what comes next to stderr."""
    print(f"... {text}", file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else None
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages."""
    found = {name: rows.version(name) for name in ("torch", "transformers", "accelerate", "schedulefree", *rows.PEERS)}
    own = {"Python": platform.python_version(), "hf_radam": hf_radam.__version__}
    return own | {name: number for name, number in found.items() if number}


def main() -> int:
    """Measure or read, then print, write and draw."""
    arguments = parse_arguments()
    if arguments.from_json:
        data = json.loads(arguments.from_json.read_text(encoding="utf-8"))
    else:
        data = measure(QUICK if arguments.quick else SETTINGS, torch.device(arguments.device))
    tables.write(arguments, "benchmark", benchmark_report.PARTS, data, left_out={"summary"})
    if arguments.figure:
        benchmark_report.draw(data, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
