"""Run code that draws random numbers without leaving a trace in the global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Context that puts the states of python, numpy, torch and every device of the accelerator back at its end.

    Args:
        seed: seed all of them on entry, for code that must draw the same numbers each time.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    kind = torch.accelerator.current_accelerator(check_available=True)
    with torch.random.fork_rng(enabled=True, **_devices(kind)):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _devices(kind: torch.device | None) -> dict:
    """Arguments for `fork_rng`: the devices that this process may draw from (only its own, in a distributed run)."""
    if kind is None:
        return {"devices": []}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        devices = [torch.accelerator.current_device_index()]
    else:
        devices = list(range(torch.accelerator.device_count()))
    return {"devices": devices, "device_type": kind.type}
