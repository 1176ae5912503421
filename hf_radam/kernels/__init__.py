"""Whole updates in one pass over memory: of both optimizers, of the average, and of both at once.

An update reads a parameter, its gradient and two states and writes all but the gradient: seven streams of memory, where
operations one after another make some 25. On CPUs a C++ kernel does it, built in about a second and then kept
(`one_pass.cpp`, `building.py`, `on_cpu.py`); on GPUs kernels of torch and of `torch.compile` (`on_gpu.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_radam.kernels import building, on_cpu, on_gpu

DEVICES = ("cpu", "cuda")
MEASURED = ("cpu",)
"""Types of devices on which fused updates were tried and found faster."""
Entry = tuple[Tensor, ...]
"""A parameter, its gradient, its two states, and whatever else goes with them."""
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Tensors that are nothing but their elements in memory; of a subclass nobody knows."""


def radam_update(
    columns: Sequence[list[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float,
    step: int,
    averages: Sequence[Tensor | None] | None = None,
    size: float = 0.0,
) -> None:
    """Make one rectified update of RAdam in place, of tensors for which `fits` holds, all of one dtype and device.

    Args:
        columns: parameters, gradients (only read), first and second moments.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        factor: rectification of the learning rate.
        step: number of the update, 1 for the first.
        averages: of the new parameters, only on CPUs, see `on_cpu.update`.
        size: step size of the averages.
    """
    if columns[0][0].device.type != "cpu":
        on_gpu.radam_update(*columns, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, factor=factor, step=step)
        return
    beta1, beta2 = betas
    rate = lr * factor * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    numbers = [1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, rate]
    on_cpu.update("radam", columns, numbers, averages=averages, size=size)


def schedule_free_update(
    columns: Sequence[list[Tensor]],
    numbers: dict[str, float],
    *,
    averages: Sequence[Tensor | None] | None = None,
    size: float = 0.0,
) -> None:
    """Make one rectified schedule-free update in place, as `radam_update`.

    Args:
        columns: y (the parameters), gradients taken there (only read), z, second moments.
        numbers: by the names in `on_gpu.NUMBERS`, see `on_gpu.schedule_free_update`.
        averages: of the new y.
        size: step size of the averages.
    """
    if columns[0][0].device.type == "cpu":
        given = [numbers[name] for name in on_gpu.NUMBERS]
        on_cpu.update("schedule_free", columns, given, averages=averages, size=size)
        return
    kernel = on_gpu.schedule_free_kernel(columns[0][0].dtype, columns[0][0].device)
    flat = [[tensor.detach().view(-1) for tensor in column] for column in columns]
    kernel([list(quadruple) for quadruple in zip(*flat, strict=True)], numbers)


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
        if ours and kind in on_cpu.AVERAGED and average.dtype is torch.float32 and are_plain(average, weight):
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


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor on this rank; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are nothing but elements in a CPU's memory, in their order: kernels see addresses alone."""
    for tensor in tensors:
        if type(tensor) not in PLAIN or not tensor.is_cpu or not tensor.is_contiguous():
            return False
        if tensor.is_neg() or tensor.is_inference() or not (tensor.data_ptr() or not tensor.numel()):
            return False
    return True


def fits(*tensors: Tensor) -> bool:
    """Whether kernels can take tensors that belong together: alike in all respects, and nothing but their elements."""
    first = tensors[0]
    dtype, device, shape = first.dtype, first.device, first.shape
    if dtype not in on_cpu.STATES or device.type not in DEVICES:
        return False
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.device != device or tensor.shape != shape:
            return False
    if DTensor in map(type, tensors):
        return all(_are_cut_alike(first, tensor) for tensor in tensors) and fits(*map(local, tensors))
    if device.type == "cpu":
        return are_plain(*tensors)
    return all(type(tensor) in PLAIN and tensor.is_contiguous() for tensor in tensors)


def together(entries: Iterable[Entry]) -> tuple[list[list[Entry]], list[Entry]]:
    """Sort entries by what one call of a kernel can take.

    Returns:
        Lists of one dtype and device each, and the rest: what does not fit, and parameters that have the same memory
        as another one before them, whose updates must come one after another.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
    rest: list[Entry] = []
    seen: set[int] = set()
    for entry in entries:
        parameter = entry[0]
        address = local(parameter).data_ptr() if fits(*entry[:4]) else None
        if address is None or address in seen:
            rest.append(entry)
            continue
        if address:  # what has no elements has none
            seen.add(address)
        alike.setdefault((parameter.dtype, parameter.device), []).append(entry)
    return [*alike.values()], rest


def _are_cut_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two DTensors are cut in the same way, and each element is whole somewhere."""
    if not (isinstance(one, DTensor) and isinstance(other, DTensor)):
        return False
    whole = not any(placement.is_partial() for placement in one.placements)
    return whole and one.placements == other.placements and one.device_mesh == other.device_mesh


def obstacle(parameters: Iterable[Tensor], *, measured: bool) -> str | None:
    """Why the updates of these parameters cannot be fused, in words; None if nothing is known against it.

    Args:
        parameters: or what of them lies on this rank.
        measured: whether it is against it that nobody has measured it on their device.
    """
    for parameter in parameters:
        if parameter.dtype not in on_cpu.STATES:
            return f"a parameter is {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.device.type not in DEVICES:
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
        if device.type == "cpu":
            building.library()
        elif schedule_free:
            on_gpu.schedule_free_kernel(dtype, device)
    return time.perf_counter() - begin
