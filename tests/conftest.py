"""What every test runs under: no hub, one thread for each process, and modules that garbage collection passes over."""

import gc
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from more threads, and with other work on the machine the threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# A checkpoint flushes some twenty files: 5 ms each on a disk, nothing in memory, where there is room.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import pytest
import torch
from launching import launches

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker."""
    config.addinivalue_line("markers", "launches: starts a process; set by itself (make test-fast leaves these out)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, before `-m` chooses among them."""
    for item in items:
        definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        fixtures = [definition.func for several in definitions.values() for definition in several]
        if launches([getattr(item, "function", None), *fixtures]):
            item.add_marker("launches")


def pytest_collection_finish() -> None:
    """Have `gc.collect`, which upstream calls in every training, pass over the half million things then imported."""
    gc.collect()
    gc.freeze()
