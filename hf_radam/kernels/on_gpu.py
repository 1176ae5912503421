"""Fused updates of tensors on a GPU: torch's fused AdamW with RAdam's numbers, and a kernel made by `torch.compile`.

RAdam's rectified update is AdamW's with other numbers, exactly, so torch's own kernel does it. For
the schedule-free update there is no such kernel anywhere: `torch.compile` makes one for each dtype and device, of any
size. Where it cannot run, inside a `TorchDispatchMode` for one, torch makes the same operations one after another. Both
take tensors on CPUs, too, where `on_cpu` is faster: between two calls, of four tensors each, is Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_radam.kernels.numbers import Numbers, RAdamNumbers

SMALLEST = 2
"""Elements of a tensor below which a kernel would be compiled anew, for just that size."""
TOGETHER = 4
"""Tensors that one call of the schedule-free kernel updates."""
NUMBERS = 8
"""How many `schedule_free_update` wants besides tensors."""
Kernel = Callable[[list[list[Tensor]], list[float]], None]
"""Takes flattened parameter, gradient, z and second moment of each, and the numbers."""


def update(columns: Sequence[list[Tensor]], numbers: Numbers) -> None:
    """Make an update in place.

    Args:
        columns: parameters, gradients (only read), and the two states, of equal shapes; every tensor contiguous, on
            one device and of one dtype.
        numbers: of the update; their kind says which.
    """
    if isinstance(numbers, RAdamNumbers):
        radam_update(columns, numbers)
        return
    kernel = schedule_free_kernel(columns[0][0].dtype, columns[0][0].device)
    flat = [[tensor.detach().view(-1) for tensor in column] for column in columns]
    kernel([list(quadruple) for quadruple in zip(*flat, strict=True)], numbers.for_kernel())


def radam_update(columns: Sequence[list[Tensor]], numbers: RAdamNumbers) -> None:
    """Make one rectified update of RAdam with torch's fused AdamW; as `update`."""
    parameters, gradients, first_moments, second_moments = columns
    adamw = numbers.for_adamw()
    steps = [torch.full((), float(numbers.step), device=parameters[0].device)] * len(parameters)
    torch._fused_adamw_(
        parameters,
        gradients,
        first_moments,
        second_moments,
        [],
        steps,
        lr=adamw["lr"],
        beta1=numbers.betas[0],
        beta2=numbers.betas[1],
        weight_decay=adamw["weight_decay"],
        eps=adamw["eps"],
        amsgrad=False,
        maximize=False,
    )
    # Torch's kernel does not, so autograd would not notice that a graph is older than the weights.
    torch.autograd.graph.increment_version([*parameters, *first_moments, *second_moments])


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
    v = second_moment * beta2 + rest2 * gradient * gradient
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

    def run(quadruples: list[list[Tensor]], numbers: list[float]) -> None:
        given = [torch.tensor(number, dtype=dtype, device="cpu") for number in numbers]
        with torch.autocast(device.type, enabled=False):  # one kernel, whatever surrounds the update
            for first in range(0, len(quadruples), TOGETHER):
                columns = [list(column) for column in zip(*quadruples[first : first + TOGETHER], strict=True)]
                kernel(*(column + rest[len(column) :] for column, rest in zip(columns, fill, strict=True)), given)

    with torch.no_grad():
        # Sizes that all differ, and tensors, or those that are equal now would have to be equal ever after; and large
        # enough to be split among threads.
        kernel(*zeros(2**17), [torch.tensor(0.5, dtype=dtype, device="cpu") for _ in range(NUMBERS)])
    return run
