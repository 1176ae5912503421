"""What every test runs under: no hub, one thread for each process, and modules that garbage collection passes over."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from more threads, and with other work on the machine the threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Have `gc.collect`, which upstream calls in every training, pass over the half million things then imported."""
    gc.collect()
    gc.freeze()
