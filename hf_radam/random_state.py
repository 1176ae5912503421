"""The global random generators of Python, NumPy, torch and the accelerator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the state of all generators on exit; `seed` seeds them on entry, to draw the same numbers each time."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        forked: dict = {"devices": []}
    elif torch.distributed.is_available() and torch.distributed.is_initialized():  # each process has its own device
        forked = {"devices": [torch.accelerator.current_device_index()], "device_type": device.type}
    else:
        forked = {"devices": range(torch.accelerator.device_count()), "device_type": device.type}
    with torch.random.fork_rng(enabled=True, **forked):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
