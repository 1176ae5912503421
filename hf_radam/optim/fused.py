"""One pass over memory for a whole update: the elementwise arithmetic of both optimizers as kernels.

RAdam's rectified update is AdamW's with other numbers, so torch's own fused AdamW does it (`adamw_numbers`). For the
schedule-free update there is no such kernel anywhere: `torch.compile` makes one for each dtype and device, of any size.
It reads y, g, z and v and writes y, z and v: seven streams, where operations one after another make some 25. Where it
cannot run, inside a `TorchDispatchMode` for one, torch makes the same operations one after another.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

DTYPES = (torch.float32, torch.float64)
DEVICES = ("cpu", "cuda")
MEASURED = ("cpu",)
"""Types of devices on which fused updates were tried and found faster."""
SMALLEST = 2
"""Elements of a tensor below which a kernel would be compiled anew, for just that size."""
TOGETHER = 4
"""Tensors that one call of the schedule-free kernel updates."""
NUMBERS = ("beta2", "rest2", "correction", "eps", "weight_decay", "c", "y_rate", "z_rate")
"""What `schedule_free_update` wants besides tensors, in its order."""
Kernel = Callable[[list[list[Tensor]], dict[str, float]], None]
"""Takes flattened parameter, gradient, z and second moment of each, and the numbers."""
WORTH_IT = 10_000_000
"""Elements of all parameters from which a fused update is worth the seconds of compiling it."""


def adamw_numbers(
    *, lr: float, beta2: float, eps: float, weight_decay: float, factor: float, step: int
) -> dict[str, float]:
    """Learning rate, weight decay and eps with which an update of AdamW is one of RAdam.

    RAdam moves by `lr factor m^ sqrt(1 - beta2^t) / (sqrt(v) + eps)` and decays by `lr weight_decay`; AdamW moves by
    `lr m^ / (sqrt(v) / sqrt(1 - beta2^t) + eps)` and decays by the same product.

    Args:
        lr: RAdam's learning rate.
        beta2: decay rate of the second moment.
        eps: RAdam's.
        weight_decay: RAdam's, decoupled.
        factor: RAdam's rectification of the learning rate, above 0.
        step: t, number of the update, 1 for the first.
    """
    return {
        "lr": lr * factor,
        "weight_decay": weight_decay / factor,
        "eps": eps / math.sqrt(1 - beta2**step),
    }


def radam_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float,
    step: int,
) -> None:
    """Make one rectified update of RAdam in place, of tensors that lie on one device and have one dtype.

    Args:
        parameters: tensors of any shapes; the next three lists have the same ones.
        gradients: only read.
        first_moments: averages of the gradients.
        second_moments: averages of the squared gradients.
        lr: RAdam's; the others likewise, see `adamw_numbers`.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        factor: rectification of the learning rate.
        step: number of the update, 1 for the first.
    """
    numbers = adamw_numbers(lr=lr, beta2=betas[1], eps=eps, weight_decay=weight_decay, factor=factor, step=step)
    steps = [torch.full((), float(step), device=parameters[0].device)] * len(parameters)
    torch._fused_adamw_(
        parameters,
        gradients,
        first_moments,
        second_moments,
        [],
        steps,
        lr=numbers["lr"],
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=numbers["weight_decay"],
        eps=numbers["eps"],
        amsgrad=False,
        maximize=False,
    )


def schedule_free_update(
    y: Tensor,
    gradient: Tensor,
    z: Tensor,
    second_moment: Tensor,
    beta2: Tensor,
    rest2: Tensor,
    correction: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    c: Tensor,
    y_rate: Tensor,
    z_rate: Tensor,
) -> None:
    """Update y, z and the second moment of the schedule-free optimizer's rectified phase, in place.

    Args:
        y: the parameter, of any shape; the next three are of the same.
        gradient: taken at y; only read.
        z: base iterate.
        second_moment: average of the squared gradients.
        beta2: decay rate of the second moment. This and what follows are tensors without dimensions.
        rest2: 1 - beta2.
        correction: 1 / (1 - beta2^t).
        eps: added to the root of the second moment.
        weight_decay: taken at y.
        c: weight of z in the average.
        y_rate: what y moves by, times the direction: lr (beta1 (1 - c) - 1).
        z_rate: what z moves by: the rectified learning rate.

    Source:
        Defazio et al. 2024, arXiv:2405.15682, algorithm 1, in the form of `schedulefree`.
    """
    v = second_moment * beta2 + gradient * gradient * rest2
    direction = gradient / ((v * correction).sqrt() + eps) + y * weight_decay
    y.copy_(y + (z - y) * c + direction * y_rate)
    z.copy_(z - direction * z_rate)
    second_moment.copy_(v)


def schedule_free_updates(
    ys: list[Tensor], gradients: list[Tensor], zs: list[Tensor], second_moments: list[Tensor], numbers: list[Tensor]
) -> None:
    """The update of several parameters, all with the same numbers, in the order of `schedule_free_update`."""
    for y, gradient, z, second_moment in zip(ys, gradients, zs, second_moments, strict=True):
        schedule_free_update(y, gradient, z, second_moment, *numbers)


@functools.cache
def _compiled() -> Callable[..., None]:
    # Compiling the headers beforehand takes longer than this one kernel.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_cache_precompile_headers": False}
    kernel: Callable[..., None] = torch.compile(schedule_free_updates, dynamic=True, options=options)
    return kernel


@functools.cache
def schedule_free_kernel(dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel for a dtype and a device: compiled, or read from the cache, when it is first asked for.

    It updates any number of flattened tensors of any sizes, `TOGETHER` at each call: between two calls Python costs
    what a megabyte does.
    """

    def zeros(size: int) -> list[list[Tensor]]:
        return [[torch.zeros(size + n, dtype=dtype, device=device) for n in range(TOGETHER)] for _ in range(4)]

    fill, kernel = zeros(SMALLEST), _compiled()

    def update(quadruples: list[list[Tensor]], numbers: dict[str, float]) -> None:
        given = [torch.tensor(numbers[name], dtype=dtype, device="cpu") for name in NUMBERS]
        with torch.autocast(device.type, enabled=False):  # one kernel, whatever surrounds the update
            for first in range(0, len(quadruples), TOGETHER):
                columns = [list(column) for column in zip(*quadruples[first : first + TOGETHER], strict=True)]
                kernel(*(column + rest[len(column) :] for column, rest in zip(columns, fill, strict=True)), given)

    with torch.no_grad():
        # Sizes that all differ, or those that are equal now would have to be equal ever after; and large enough to be
        # split among threads.
        kernel(*zeros(2**17), [torch.tensor(0.5, dtype=dtype, device="cpu") for _ in NUMBERS])
    return update


def compile_for(kinds: Iterable[tuple[torch.dtype, torch.device]]) -> float:
    """Have the schedule-free kernels of dtypes and devices ready; returns the seconds that it took."""
    begin = time.perf_counter()
    for dtype, device in kinds:
        schedule_free_kernel(dtype, device)
    return time.perf_counter() - begin


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor on this rank; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fits(*tensors: Tensor) -> bool:
    """Whether kernels can take tensors that belong together: alike in all respects, and without gaps in memory.

    Torch's kernel, too, goes through memory without regard to strides.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device or tensor.shape != first.shape:
            return False
        if isinstance(tensor, DTensor) or isinstance(first, DTensor):
            if not _are_alike(first, tensor) or not local(tensor).is_contiguous():
                return False
        elif not tensor.is_contiguous():
            return False
    return first.dtype in DTYPES and first.device.type in DEVICES


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two DTensors are cut in the same way, and each element is whole somewhere."""
    if not (isinstance(one, DTensor) and isinstance(other, DTensor)):
        return False
    whole = not any(placement.is_partial() for placement in one.placements)
    return whole and one.placements == other.placements and one.device_mesh == other.device_mesh


def flattened(*tensors: Tensor) -> list[Tensor] | None:
    """This rank's part of tensors that belong together, flattened, if the schedule-free kernel can take them."""
    if not fits(*tensors):
        return None
    parts = [local(tensor).detach() for tensor in tensors]
    return [part.view(-1) for part in parts] if parts[0].numel() >= SMALLEST else None


def obstacle(parameters: Iterable[Tensor], *, measured: bool) -> str | None:
    """Why the updates of these parameters cannot be fused, in words; None if nothing is known against it.

    Args:
        parameters: or what of them lies on this rank.
        measured: whether it is against it that nobody has measured it on their device.
    """
    for parameter in parameters:
        if parameter.dtype not in DTYPES:
            return f"a parameter is {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.device.type not in DEVICES:
            return f"there is no kernel for {parameter.device.type}"
        if measured and parameter.device.type not in MEASURED:
            return f"not measured on {parameter.device.type}; fused_optimizer=true does it all the same"
    return None
