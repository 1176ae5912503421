"""Calls of the C++ kernels for tensors on CPUs: one call for any number of tensors, by their addresses."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_radam.kernels.building import library
from hf_radam.kernels.numbers import Numbers, RAdamNumbers, ScheduleFreeNumbers

KERNELS = {RAdamNumbers: "radam", ScheduleFreeNumbers: "schedule_free"}

STATES = {torch.float32: "float32", torch.float64: "float64"}
"""Dtypes of parameters with which optimizers are fused."""
AVERAGED = STATES | {torch.bfloat16: "bfloat16"}
"""Dtypes of parameters that are averaged in one pass."""


@functools.cache
def _function(name: str, *types: Any) -> Any:
    """A kernel, with the types of what follows its count, sizes and threads."""
    function = library()[name]
    function.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, *types]
    function.restype = None
    return function


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_int64 * len(tensors))(*[tensor.numel() for tensor in tensors])


def update(
    columns: Sequence[list[Tensor]],
    numbers: Numbers,
    *,
    averages: Sequence[Tensor | None] | None = None,
    size: float = 0.0,
) -> None:
    """Make an optimizer's update in place.

    Args:
        columns: parameters, gradients (only read), and the two states, of equal numbers of elements; every tensor
            contiguous, on a CPU and of one dtype of `STATES`.
        numbers: of the update; their kind says which.
        averages: float32 averages of the new parameters, or None for those that have none.
        size: by how much of its distance an average moves towards its parameter.
    """
    parameters, gradients, first, second = columns
    kind, given = KERNELS[type(numbers)], numbers.for_kernel()
    function = _function(
        f"{kind}_{STATES[parameters[0].dtype]}", *[ctypes.c_void_p] * 5, ctypes.c_double, ctypes.c_void_p
    )
    function(
        len(parameters),
        _sizes(parameters),
        torch.get_num_threads(),
        *[_addresses(column) for column in columns],
        None if averages is None else _addresses(averages),
        size,
        (ctypes.c_double * len(given))(*given),
    )
    # Autograd must notice that a graph is older than the weights, as with any operation of torch.
    written = [*parameters, *first, *second, *(averages or [])]
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


def average(averages: list[Tensor], weights: list[Tensor], size: float) -> None:
    """Move every average towards its weights by `size` of the distance, in place.

    Args:
        averages: float32, contiguous, on a CPU.
        weights: contiguous, on a CPU, of the same numbers of elements, and of one dtype of `AVERAGED`.
        size: in [0, 1].
    """
    name = f"average_{AVERAGED[weights[0].dtype]}"
    function = _function(name, *[ctypes.c_void_p] * 2, ctypes.c_double)
    function(len(averages), _sizes(averages), torch.get_num_threads(), _addresses(averages), _addresses(weights), size)
    torch.autograd.graph.increment_version(averages)
