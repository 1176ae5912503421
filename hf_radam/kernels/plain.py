"""Which tensors a kernel can take: those that are nothing but their elements in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_radam.kernels import on_cpu, on_gpu

DEVICES = ("cpu", "cuda")
Entry = tuple[Tensor, ...]
"""A parameter, its gradient, its two states, and whatever else goes with them."""
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Tensors that are nothing but their elements in memory; of a subclass nobody knows."""


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
    return first.numel() >= on_gpu.SMALLEST and all(type(t) in PLAIN and t.is_contiguous() for t in tensors)


def together(entries: Iterable[Entry]) -> tuple[list[list[Entry]], list[Entry]]:
    """Sort entries by what one call of a kernel can take.

    Returns:
        Lists of one dtype and device each, and the rest: what does not fit, and parameters that share memory with one
        another, whose updates must come one after another.
    """
    given = [*entries]
    fitting = [n for n, entry in enumerate(given) if fits(*entry[:4])]
    apart = {*fitting} - {fitting[n] for n in sharing([local(given[n][0]) for n in fitting])}
    alike: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
    for n in sorted(apart):
        alike.setdefault((given[n][0].dtype, given[n][0].device), []).append(given[n])
    return [*alike.values()], [entry for n, entry in enumerate(given) if n not in apart]


def sharing(tensors: Sequence[Tensor]) -> set[int]:
    """The places of those among these tensors (plain, of any strides) whose memory meets that of another."""
    stretches = []
    for n, tensor in enumerate(tensors):
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            stretches.append((begin, begin + (last + 1) * tensor.element_size(), n))
    found: set[int] = set()
    farthest, whose = 0, -1
    for begin, end, n in sorted(stretches):
        if begin < farthest:
            found |= {n, whose}
        if end > farthest:
            farthest, whose = end, n
    return found


def _are_cut_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two DTensors are cut in the same way, and each element is whole somewhere."""
    if not (isinstance(one, DTensor) and isinstance(other, DTensor)):
        return False
    whole = not any(placement.is_partial() for placement in one.placements)
    return whole and one.placements == other.placements and one.device_mesh == other.device_mesh
