"""The global random generators: run code that leaves no trace in them, or keep their states and put them back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
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


def keep_random_state() -> Callable[[], None]:
    """Keep the states of python, numpy, torch and every device of the accelerator.

    Returns:
        A function that puts them back; it may be called more than once.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    kind = torch.accelerator.current_accelerator(check_available=True)
    devices = {index: torch.get_device_module(kind).get_rng_state(index) for index in _devices(kind)["devices"]}

    def put_back() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for index, state in devices.items():
            torch.get_device_module(kind).set_rng_state(state, index)

    return put_back


def _devices(kind: torch.device | None) -> dict:
    """Arguments for `fork_rng`: the devices that this process may draw from (only its own, in a distributed run)."""
    if kind is None:
        return {"devices": []}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        devices = [torch.accelerator.current_device_index()]
    else:
        devices = list(range(torch.accelerator.device_count()))
    return {"devices": devices, "device_type": kind.type}
