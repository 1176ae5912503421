"""Fused updates of tensors on a GPU: torch's fused AdamW with RAdam's numbers, and a kernel made by `torch.compile`.

RAdam's rectified update is AdamW's with other numbers, exactly, so torch's own kernel does it (`adamw_numbers`). For
the schedule-free update there is no such kernel anywhere: `torch.compile` makes one for each dtype and device, of any
size. Where it cannot run, inside a `TorchDispatchMode` for one, torch makes the same operations one after another. Both
take tensors on CPUs, too, where `on_cpu` is faster: between two calls, of four tensors each, is Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2
"""Elements of a tensor below which a kernel would be compiled anew, for just that size."""
TOGETHER = 4
"""Tensors that one call of the schedule-free kernel updates."""
NUMBERS = ("beta2", "rest2", "correction", "eps", "weight_decay", "c", "y_rate", "z_rate")
"""What `schedule_free_update` wants besides tensors, in its order."""
Kernel = Callable[[list[list[Tensor]], dict[str, float]], None]
"""Takes flattened parameter, gradient, z and second moment of each, and the numbers."""


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
