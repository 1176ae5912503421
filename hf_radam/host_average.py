"""Averages in host memory of weights on a GPU, moved while the GPU computes on.

Copies run on a stream of their own into pinned buffers; a thread moves the averages when they have arrived. Between two
updates nothing of this lies in the GPU's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_radam.kernels import average_update


class Copier(Protocol):
    """Copies tensors of one device to host memory while that device goes on."""

    def buffer(self, weight: Tensor) -> Tensor:
        """Room for a tensor in host memory."""
        ...

    def start(self, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> Any:
        """Begin to copy what the weights are after all that was asked of the device so far; returns a ticket."""
        ...

    def hold_back(self, ticket: Any) -> None:
        """Have whatever is asked of the device from now on wait for these copies, without waiting here."""
        ...

    def wait(self, ticket: Any) -> None:
        """Wait until the copies are in host memory."""
        ...


class StreamCopier:
    """Copies on a CUDA stream of its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def buffer(self, weight: Tensor) -> Tensor:
        """Pinned: others cannot be copied to without waiting."""
        return torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)

    def start(self, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> torch.cuda.Event:
        """Copy behind what the current stream has been asked so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for weight, buffer in zip(weights, buffers, strict=True):
                buffer.copy_(weight, non_blocking=True)
                weight.record_stream(self.stream)  # not to be given to something else before it was read
        arrived = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
        arrived.record(self.stream)
        return arrived

    def hold_back(self, ticket: torch.cuda.Event) -> None:
        """The current stream waits."""
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def wait(self, ticket: torch.cuda.Event) -> None:
        """This thread waits; others run."""
        ticket.synchronize()


class HostAverage:
    """Moves averages in host memory towards weights of one device; the result is there after `finish()`.

    Args:
        copier: of that device.
    """

    def __init__(self, copier: Copier):
        self._copier = copier
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf_radam-average")
        self._buffers: list[Tensor] = []
        self._job: Future[None] | None = None
        self._ticket: Any = None
        self._read: list[tuple[Tensor, int]] = []

    def move(self, averages: list[Tensor], weights: list[Tensor], size: float, *, of: Sequence[Tensor]) -> None:
        """Begin to move every average by `size` of its distance towards its weights, as they are now.

        Nothing may write to the weights before `before_writing()`.

        Args:
            averages: float32, in host memory.
            weights: on the device, of the same shapes.
            size: in [0, 1].
            of: the parameters that the weights are of; by them a write is noticed (but not one to `p.data`).
        """
        self.finish()
        weights = [weight.detach() for weight in weights]
        if [(b.shape, b.dtype) for b in self._buffers] != [(w.shape, w.dtype) for w in weights]:
            self._buffers = [self._copier.buffer(weight) for weight in weights]
        self._read = [(parameter, parameter._version) for parameter in of]
        self._ticket = self._copier.start(weights, self._buffers)
        self._job = self._thread.submit(self._arrived, self._ticket, averages, size)

    @torch.no_grad()
    def _arrived(self, ticket: Any, averages: list[Tensor], size: float) -> None:
        self._copier.wait(ticket)
        average_update(averages, self._buffers, size)

    def before_writing(self) -> None:
        """Have the device read the weights before anything that is asked of it from now on writes to them.

        Raises:
            RuntimeError: if something has written to them already.
        """
        if self._ticket is None:
            return
        self._copier.hold_back(self._ticket)
        self._ticket = None
        read, self._read = self._read, []
        written = [parameter.shape for parameter, version in read if parameter._version != version]
        if written:
            raise RuntimeError(
                f"Something has written to a weight of shape {tuple(written[0])} while it was being copied to its "
                "average in host memory: leave out ewa_device, or write in on_pre_optimizer_step or on_optimizer_step."
            )

    def finish(self) -> None:
        """Wait until the averages have moved; raises what went wrong with that."""
        self.before_writing()
        job, self._job = self._job, None
        if job is not None:
            job.result()


def host_average(weights: torch.device, averages: torch.device) -> HostAverage | None:
    """What moves averages on one device towards weights on another; None where nothing can go on meanwhile."""
    if weights.type == "cuda" and averages.type == "cpu":
        return HostAverage(StreamCopier(weights))
    return None


class AverageMover:
    """Moves averages towards their weights, wherever both lie; what may go on meanwhile does."""

    def __init__(self) -> None:
        self._hosts: dict[tuple[torch.device, torch.device], HostAverage | None] = {}

    def move(self, given: Sequence[tuple[Tensor, Tensor, Tensor]], size: float) -> None:
        """Begin to move every average; it has moved after `finish()`.

        Args:
            given: averages, their weights, and the parameters that these are of.
            size: by how much of its distance each moves, in [0, 1].
        """
        by_way: dict[tuple[torch.device, torch.device], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for entry in given:
            by_way.setdefault((entry[1].device, entry[0].device), []).append(entry)
        for way, alike in by_way.items():
            averages, weights, parameters = (list(column) for column in zip(*alike, strict=True))
            if way not in self._hosts:
                self._hosts[way] = host_average(*way)
            host = self._hosts[way]
            if host is None:
                average_update(averages, weights, size)
            else:
                host.move(averages, weights, size, of=parameters)

    def before_writing(self) -> None:
        """As that of each `HostAverage`."""
        for host in filter(None, self._hosts.values()):
            host.before_writing()

    def finish(self) -> None:
        """As that of each `HostAverage`."""
        for host in filter(None, self._hosts.values()):
            host.finish()
