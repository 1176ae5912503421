"""Memory that a row takes besides parameters and gradients, measured in a process of its own for each row.

On CPUs that is the resident memory of the process (Linux: `/proc/self`, whose high-water mark can be set back); on GPUs
what torch has allocated. The row runs twice: what compiling and loading take is there before the second begins.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .rows import ROWS, shapes, size_of
from .timing import WARM_UP, Running

CLEAR = Path("/proc/self/clear_refs")
HIGH_WATER = "5"
"""What is written there to set the high-water mark back to what is resident."""
MMAP_THRESHOLD = 1 << 16
"""Bytes from which glibc gives memory back at once when it is freed (an option of `mallopt`, number -3)."""


def measurable(device: torch.device) -> bool:
    """Whether memory can be measured here."""
    return device.type == "cuda" or os.access(CLEAR, os.W_OK)


def status(field: str) -> int:
    """Bytes that the kernel tells of this process: `VmRSS` or `VmHWM`."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def held(device: torch.device) -> int:
    """Bytes in use now."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Let the peak be what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        CLEAR.write_text(HIGH_WATER)


def peak(device: torch.device) -> int:
    """Most bytes in use since then."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def measure(what: str, name: str, millions: float, device: torch.device) -> dict[str, float]:
    """Bytes per parameter that one row holds after an update, and at the most while it makes one."""
    if device.type == "cpu":
        ctypes.CDLL(None).mallopt(-3, MMAP_THRESHOLD)
    (row,) = [row for row in ROWS[what]() if row.name == name]
    sizes = shapes(millions)
    for _ in range(2):
        running = Running(row, sizes, device)
        before = held(device)
        for _ in range(WARM_UP):
            running.once()
        after = held(device)
        forget_peak(device)
        running.once()
        largest = peak(device)
        del running
    return {"held": (after - before) / size_of(sizes), "peak": (largest - before) / size_of(sizes)}


def table(what: str, millions: float, device: torch.device) -> dict[str, Any]:
    """Measure every row of a table, each in a process of its own.

    Returns:
        For JSON: the size, and of each row the bytes per parameter held between updates and at the most.
    """
    rows = []
    for row in ROWS[what]():
        command = [sys.executable, "-m", "benchmarking.memory", what, row.name, str(millions), str(device)]
        folder = Path(__file__).parents[1]
        paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The memory of {row.name} could not be measured:\n{done.stderr[-3000:]}")
        rows.append({"name": row.name} | json.loads(done.stdout.splitlines()[-1]))
    return {"what": what, "parameters": size_of(shapes(millions)), "rows": rows}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], float(sys.argv[3]), torch.device(sys.argv[4]))))
