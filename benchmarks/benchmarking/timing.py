"""Time rows in turns, round after round in other orders, against the memory's bandwidth measured in the same rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .rows import ROWS, Row, limit_of, model_of, our_average, size_of

WARM_UP = 8
"""Runs before the first that counts: they compile, make the states, and pass RAdam's first phase."""


class Running:
    """A row that runs, on parameters of its own.

    Args:
        row: which.
        sizes: shapes of the parameters.
        device: where they are.
    """

    def __init__(self, row: Row, sizes: list[tuple[int, ...]], device: torch.device):
        self.row = row
        self.device = device
        self.seconds: list[float] = []
        self._model = model_of(sizes, device, row.dtype)
        self._gradients = [parameter.grad for parameter in self._model]
        self._run: Callable[[], Any] | None = None

    def once(self) -> float:
        """Seconds of one run. Gradients that were taken are given back before; the first run also makes the row."""
        if self.row.takes_gradients:
            for parameter, gradient in zip(self._model, self._gradients, strict=True):
                parameter.grad = gradient
        if self._run is None:
            self._run = self.row.make(self._model)
        synchronize(self.device)
        begin = time.perf_counter()
        self._run()
        synchronize(self.device)
        return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(
    what: str, sizes: list[tuple[int, ...]], device: torch.device, *, rounds: int, growing: bool
) -> dict[str, Any]:
    """Time the rows of `updates` or `averaging` at one model size.

    Args:
        what: which of `ROWS`.
        sizes: shapes of the parameters.
        device: where they are.
        rounds: times that each row counts.
        growing: only the rows that are measured at several sizes.

    Returns:
        For JSON: the size, and of each row the seconds of each round, their median, and the median of their ratios to
        the time that the row's bytes take at the bandwidth of the first row, a plain `lerp_`, in the same round.
    """
    rows = [limit_of(sizes, device), *(row for row in ROWS[what]() if row.grows or not growing)]
    running = [Running(row, sizes, device) for row in rows]
    for each in running:
        for _ in range(WARM_UP):
            each.once()
    orders = random.Random(0)  # what ran before leaves its threads and caches: not always the same to the same
    for _ in range(rounds):
        for each in orders.sample(running, len(running)):
            each.seconds.append(each.once())
    return {
        "what": what,
        "parameters": size_of(sizes),
        "tensors": len(sizes),
        "rows": [
            {
                "name": each.row.name,
                "bytes_per_parameter": each.row.traffic,
                "seconds": statistics.median(each.seconds),
                "to_limit": to_limit(each, running[0]),
                "rounds": each.seconds,
            }
            for each in running
        ],
    }


def to_limit(one: Running, limit: Running) -> float:
    """Median over the rounds of the ratio to the limit: machines change their pace, mostly slower than rounds do."""
    ratios = [mine / bound for mine, bound in zip(one.seconds, limit.seconds, strict=True)]
    return statistics.median(ratios) * limit.row.traffic / one.row.traffic


def intervals(sizes: list[tuple[int, ...]], device: torch.device, *, every: list[int], rounds: int) -> dict[str, Any]:
    """Time our averaging at every so many updates, over whole periods of all of them.

    Returns:
        For JSON: the size, and of each interval the seconds per update of each round and their median.

    Raises:
        ValueError: if the largest interval is not a multiple of each.
    """
    updates = max(every)
    for interval in every:
        if updates % interval:
            raise ValueError(f"{updates} updates are not whole periods of {interval}: give divisors of the largest.")
    running = [Running(Row(f"every {n}", partial(our_average, every=n)), sizes, device) for n in every]
    for number in range(rounds + 1):
        for each in running:
            seconds = sum(each.once() for _ in range(updates)) / updates
            if number > 0:  # the first round copies the weights
                each.seconds.append(seconds)
    return {
        "parameters": size_of(sizes),
        "updates_per_round": updates,
        "rows": [
            {"every": interval, "seconds": statistics.median(each.seconds), "rounds": each.seconds}
            for interval, each in zip(every, running, strict=True)
        ],
    }
