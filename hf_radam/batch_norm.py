"""Recompute BatchNorm statistics for averaged weights, from a few dozen training batches.

Running means and variances belong to the weights that produced them (Izmailov et al. 2018, arXiv:1803.05407, 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_modules(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def statistics(model: nn.Module) -> list[Tensor]:
    """Return copies of all running means, variances and batch counters, in the order of `model.modules()`."""
    return [buffer.detach().clone() for m in batch_norm_modules(model) for buffer in m.buffers(recurse=False)]


@torch.no_grad()
def load_statistics(model: nn.Module, values: list[Tensor]) -> None:
    """Load the result of `statistics(model)` into the layers, bit for bit."""
    buffers = [buffer for m in batch_norm_modules(model) for buffer in m.buffers(recurse=False)]
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


@contextmanager
def statistics_restored(model: nn.Module) -> Iterator[None]:
    """Open a context at whose end the running statistics are restored."""
    values = statistics(model)
    try:
        yield
    finally:
        load_statistics(model, values)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call `model` with a mapping as keywords, a sequence as positional arguments, anything else as the one input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    return model(batch)


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] = default_forward
) -> int:
    """Replace the running statistics of every BatchNorm layer by the mean over `batches`, with the present weights.

    Only BatchNorm layers run in training mode, so dropout stays off. The running mean becomes the mean of the batch
    means, the running variance the mean of the unbiased batch variances. A layer that no batch reaches keeps its
    statistics, and so do all if anything is raised; modes and momenta are restored.

    Args:
        model: any module. Without a BatchNorm layer no batch is drawn.
        batches: arguments of `forward`; about 50 training batches are enough.
        forward: called as `forward(model, batch)`.

    Returns:
        Number of batches used.

    Raises:
        ValueError: if there are BatchNorm layers but no batch.
    """
    layers = batch_norm_modules(model)
    if not layers:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta, before = [layer.momentum for layer in layers], statistics(model)
    used = 0
    try:
        model.eval()
        for layer in layers:
            # So that the first batch replaces the old statistics.
            layer.num_batches_tracked.zero_()  # type: ignore[union-attr]
            layer.momentum = None  # a cumulative average
            layer.train()
        for batch in batches:
            forward(model, batch)
            used += 1
        if not used:
            raise ValueError("`batches` is empty. BatchNorm statistics need at least one batch.")
    except BaseException:
        load_statistics(model, before)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return used
