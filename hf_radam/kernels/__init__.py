"""Whole updates in one pass over memory: of both optimizers, of the average, and of both at once.

An update reads a parameter, its gradient and two states and writes all but the gradient: seven streams of memory, where
operations one after another make some 25. On CPUs a C++ kernel does it, built in about a second and then kept
(`one_pass.cpp`, `building.py`, `on_cpu.py`); on GPUs kernels of torch and of `torch.compile` (`on_gpu.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_radam.kernels import building, on_cpu, on_gpu, plain
from hf_radam.kernels.folding import Folding
from hf_radam.kernels.numbers import Numbers

MEASURED = ("cpu",)
"""Types of devices on which fused updates were tried and found faster."""


def fused_update(entries: list[plain.Entry], numbers: Numbers, folding: Folding | None = None) -> None:
    """Make a rectified update in place.

    Args:
        entries: of one call, as `plain.together` sorts them: parameters, gradients (only read), and for RAdam first
            and second moments, for the schedule-free update z and second moments.
        numbers: of the update; their kind says which.
        folding: what to average in the same pass; only on CPUs.
    """
    columns = [[*map(plain.local, column)] for column in zip(*(entry[:4] for entry in entries), strict=True)]
    if columns[0][0].device.type != "cpu":
        on_gpu.update(columns, numbers)
    elif folding is None:
        on_cpu.update(columns, numbers)
    else:
        parameters = [entry[0] for entry in entries]
        on_cpu.update(columns, numbers, averages=folding.of(parameters), size=folding.size)
        folding.note(parameters)


def average_update(averages: list[Tensor], weights: list[Tensor], size: float) -> None:
    """Move float32 averages by `size` of their distance towards their weights, in place.

    Args:
        averages: float32.
        weights: of the same shapes; of any dtype and on any device, which may cost a copy of one at a time.
        size: in [0, 1].
    """
    ours = building.why_not() is None
    in_one_pass: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    at_once: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for average, weight in zip(averages, weights, strict=True):
        kind, device = weight.dtype, weight.device
        if device != average.device:
            average.lerp_(weight.to(device=average.device, dtype=average.dtype), size)
            continue
        if ours and kind in on_cpu.AVERAGED and average.dtype is torch.float32 and plain.are_plain(average, weight):
            pair = in_one_pass.setdefault(kind, ([], []))
        elif kind is average.dtype:
            pair = at_once.setdefault(device, ([], []))
        else:
            average.lerp_(weight.to(average.dtype), size)
            continue
        pair[0].append(average)
        pair[1].append(weight)
    for pair in in_one_pass.values():
        on_cpu.average(*pair, size)
    for pair in at_once.values():
        torch._foreach_lerp_(*pair, size)


def obstacle(parameters: Iterable[Tensor], *, measured: bool) -> str | None:
    """Why the updates of these parameters cannot be fused, in words; None if nothing is known against it.

    Args:
        parameters: or what of them lies on this rank.
        measured: whether it is against it that nobody has measured it on their device.
    """
    for parameter in parameters:
        if parameter.dtype not in on_cpu.STATES:
            return f"a parameter is {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.device.type not in plain.DEVICES:
            return f"there is no kernel for {parameter.device.type}"
        if measured and parameter.device.type not in MEASURED:
            return f"not measured on {parameter.device.type}; fused_optimizer=true does it all the same"
    return None


def make_ready(kinds: Iterable[tuple[torch.dtype, torch.device]], *, schedule_free: bool) -> float:
    """Have the optimizers' kernels for dtypes and devices ready; returns the seconds that it took.

    Raises:
        BuildError: where kernels must be built and cannot be.
        Exception: whatever `torch.compile` raises.
    """
    begin = time.perf_counter()
    for dtype, device in kinds:
        if dtype not in on_cpu.STATES:
            continue
        if device.type == "cpu":
            building.library()
        elif schedule_free and device.type in plain.DEVICES:
            on_gpu.schedule_free_kernel(dtype, device)
    return time.perf_counter() - begin
