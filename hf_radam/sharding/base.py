"""The interface of every sharding: this rank's shard of each parameter, and gathering complete tensors from shards.

The package's docstring gives the idea.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Shards = Iterable[tuple[str, Tensor]]
"""Parameter names, and this rank's shard of a value for each, shaped as `Sharding.optimizer_shard`."""
Ranges = list[tuple[int, int]]
"""First element and number of elements of each rank's shard of a flattened tensor."""
WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
BLOCK = 2**20
"""Elements that `Exchange` swaps at a time."""


def canonical(name: str) -> str:
    """Return a parameter's name without the prefixes of FSDP, activation checkpointing and torch.compile."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_object(value: Any) -> list[Any]:
    """All-gather `value`, a picklable object: return the value of each rank; collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _gather_ranges(shard: Tensor, numel: int, ranges: Ranges, *, everywhere: bool) -> Tensor | None:
    """Assemble a flattened tensor, on every rank or on rank 0, from the range that each rank has; collective."""
    complete = shard.new_empty(numel) if everywhere or rank() == 0 else None
    longest = max(length for _, length in ranges)
    if longest * len(ranges) > 2 * numel:  # few ranks have it all (ZeRO-1 and 2): nobody pads
        for owner, (start, length) in enumerate(ranges):
            part = shard if complete is None else complete[start : start + length]
            if owner == rank() and complete is not None:
                part.copy_(shard)
            if length and everywhere:
                dist.broadcast(part, src=owner)
            elif length and owner == rank() != 0:
                dist.send(part, dst=0)
            elif length and owner != 0 and rank() == 0:
                dist.recv(part, src=owner)
        return complete
    padded = shard.new_zeros(longest)
    padded[: shard.numel()] = shard
    received = None if complete is None else [torch.empty_like(padded) for _ in ranges]
    if everywhere:
        dist.all_gather(received, padded)
    else:
        dist.gather(padded, received, dst=0)
    if complete is not None and received is not None:
        for part, (start, length) in zip(received, ranges, strict=True):
            complete[start : start + length] = part[:length]
    return complete


class Sharding(ABC):
    """The parameters of a model by canonical name, tied ones once, and this rank's shard of each.

    `device` is one on which tensors can be sent to other ranks; None for the tensor's own.
    """

    def __init__(self, parameters: dict[str, Any], *, device: torch.device | None = None):
        self.parameters = parameters
        self.device = device
        self.trained = [name for name in parameters if self.trains(name)]
        """Names of the parameters that were trainable at construction: the ones that are averaged."""

    # ---- One parameter ----

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the complete parameter."""
        return torch.Size(self.parameters[name].shape)

    def trains(self, name: str) -> bool:
        """Return whether the parameter is trainable now."""
        return bool(self.parameters[name].requires_grad)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the model's weights."""
        dtype: torch.dtype = self.parameters[name].dtype
        return dtype

    @abstractmethod
    def optimizer_shard(self, name: str) -> Tensor:
        """Return this rank's shard of a trainable parameter as the optimizer holds it: the tensor itself, no copy."""

    @abstractmethod
    def model_shard(self, name: str) -> Tensor:
        """Return this rank's shard of any parameter as the forward pass uses it: the tensor itself, no copy."""

    @abstractmethod
    def optimizer_start(self, name: str) -> int:
        """Return the index of the first element of `optimizer_shard` in the flattened parameter."""

    def model_start(self, name: str) -> int:
        """Return the index of the first element of `model_shard` in the flattened parameter."""
        return self.optimizer_start(name)

    def state(self, name: str, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """Return the optimizer state `key` of `optimizer_shard`, or None before there is any."""
        return optimizer.state.get(self.parameters[name], {}).get(key)

    def groups(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """Return the parameter group of every parameter that the optimizer trains."""
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        return {name: group_of[parameter] for name, parameter in self.parameters.items() if parameter in group_of}

    def check(self) -> None:
        """Raise `RuntimeError` if an `optimizer_shard` and its `model_shard` differ: their order is unknown."""
        for name in self.trained:
            shard, weights = self.optimizer_shard(name).flatten(), self.model_shard(name).flatten()
            offset = self.optimizer_start(name) - self.model_start(name)
            same = weights[offset : offset + shard.numel()]
            if not torch.allclose(shard.to(same.device, same.dtype), same, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(
                    f"The optimizer's weights of {name} on rank {rank()} are not those of the forward pass. Please "
                    "report this, with the versions and the configuration of the back-end."
                )

    # ---- Complete tensors ----

    @cached_property
    def _ranges(self) -> dict[tuple[str, bool], Ranges]:
        """Range of every rank's `model_shard` (False) and `optimizer_shard` (True); all-gathered once."""
        own, trained = {}, set(self.trained)
        for name in self.parameters:
            own[name, False] = (self.model_start(name), self.model_shard(name).numel())
            if name in trained:
                own[name, True] = (self.optimizer_start(name), self.optimizer_shard(name).numel())
        ranks = all_gather_object(own)
        return {key: [ranges[key] for ranges in ranks] for key in own}

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """Gather the complete value of a parameter from shards like `optimizer_shard` on every rank; collective.

        Where nothing has to be sent, the result is `shard` itself.
        """
        complete = self._gather(name, shard, optimizer=True, everywhere=True)
        assert complete is not None
        return complete

    def gather_model(self, name: str) -> Tensor:
        """Gather the complete parameter as the forward pass uses it on every rank; collective."""
        complete = self._gather(name, self.model_shard(name).detach(), optimizer=False, everywhere=True)
        assert complete is not None
        return complete

    def gather_to_rank0(self, name: str, shard: Tensor | None) -> Tensor | None:
        """Gather as `gather` does on rank 0 alone; the other ranks get None. Collective.

        `shard` is None on every rank for the parameter itself, as the forward pass uses it.
        """
        optimizer = shard is not None
        shard = self.model_shard(name).detach() if shard is None else shard
        return self._gather(name, shard, optimizer=optimizer, everywhere=False)

    def _gather(self, name: str, shard: Tensor, *, optimizer: bool, everywhere: bool) -> Tensor | None:
        shape = self.shape(name)
        if self._is_complete(name, optimizer=optimizer):
            return shard.view(shape) if everywhere or rank() == 0 else None
        shard = shard.reshape(-1).to(self.device or shard.device)
        complete = _gather_ranges(shard, shape.numel(), self._ranges[name, optimizer], everywhere=everywhere)
        return None if complete is None else complete.view(shape)

    @abstractmethod
    def _is_complete(self, name: str, *, optimizer: bool) -> bool:
        """Return whether `optimizer_shard`, or `model_shard`, is the complete parameter on every rank."""

    def local_shard(self, name: str, complete: Tensor) -> Tensor:
        """Return this rank's shard of a complete value, shaped as `optimizer_shard`: a view where possible."""
        like, start = self.optimizer_shard(name), self.optimizer_start(name)
        return complete.reshape(-1)[start : start + like.numel()].view(like.shape)

    # ---- Other weights in the model ----

    @abstractmethod
    def _write(self, name: str, shard: Tensor) -> None:
        """Copy a value, shaped as `optimizer_shard`, into the weights of the forward pass, cast to their dtype."""

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Enter a context in which `model_shard` may be changed, so that the next forward pass sees it."""
        yield

    @contextmanager
    def holding(self, shards: Callable[[], Shards]) -> Iterator[None]:
        """Enter a context in which the forward pass uses other values; the weights are restored bit for bit.

        `shards` makes the values, shaped as `optimizer_shard`, each just before it is written.
        """
        saved: dict[str, Tensor] = {}
        try:
            with torch.no_grad(), self.editing():
                for name, shard in shards():
                    saved[name] = self.model_shard(name).detach().clone()
                    self._write(name, shard)
            yield
        finally:
            with torch.no_grad(), self.editing():
                for name, value in reversed(saved.items()):  # some may share memory
                    self.model_shard(name).copy_(value)

    @contextmanager
    def exchanging(self, shards: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Enter a context like `holding`, in which values and weights are swapped in place where possible.

        `shards` are the values, shaped as `optimizer_shard`; inside the context a swapped one holds the weights, and
        the yielded dictionary has the tensor that holds each value. If something wrote to swapped weights, and so
        changed the values, leaving raises `RuntimeError`; the weights are restored nevertheless.
        """
        swapped = {name: self.model_shard(name).detach() for name, s in shards.items() if self._can_exchange(name, s)}
        exchange = Exchange((weights, shards[name]) for name, weights in swapped.items())
        copied = {name: shard for name, shard in shards.items() if name not in swapped}
        with self.holding(copied.items):
            try:
                with torch.no_grad(), self.editing():
                    before = fingerprint(shards[name] for name in swapped)
                    exchange.swap()
                yield copied | swapped
            finally:
                with torch.no_grad(), self.editing():
                    exchange.undo()
                    for name, weights in swapped.items():
                        if self.model_shard(name).data_ptr() != weights.data_ptr():  # moved or cast meanwhile
                            self.model_shard(name).copy_(weights)
            after = fingerprint(shards[name] for name in swapped)
            written = [name for name, one, other in zip(swapped, before, after, strict=True) if one != other]
            if written:
                raise RuntimeError(
                    f"Something wrote to {written[0]} while the averaged weights were in it. Copy the model before "
                    "changing it."
                )

    def _can_exchange(self, name: str, shard: Tensor) -> bool:
        """Return whether the forward pass uses `optimizer_shard` itself, and a value could be swapped with it."""
        return False

    def shared(self) -> Sharding:
        """Return a sharding that divides among the ranks what each of them holds complete here."""
        return self


@dataclass(frozen=True)
class Weights:
    """One kind of weights of a model: its average, x of a schedule-free optimizer, or its parameters."""

    sharding: Sharding
    shard: Callable[[str], Tensor | None]
    """This rank's shard by name, like `optimizer_shard`; None, on every rank, where it is the parameter itself."""

    @classmethod
    def of_model(cls, sharding: Sharding) -> Weights:
        """Return the weights that the model holds."""
        return cls(sharding, lambda name: None)

    def gather_to_rank0(self, name: str) -> Tensor | None:
        """Gather the complete tensor on rank 0; collective."""
        return self.sharding.gather_to_rank0(name, self.shard(name))

    def start_and_shard(self, name: str) -> tuple[int, Tensor]:
        """Return the index of this rank's first element in the flattened parameter, and its shard."""
        shard = self.shard(name)
        if shard is None:
            return self.sharding.model_start(name), self.sharding.model_shard(name).detach()
        return self.sharding.optimizer_start(name), shard


class Exchange:
    """Swap pairs of contiguous tensors in place, block by block, so that an interruption at any point can be undone."""

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]):
        self._blocks = [
            block
            for one, other in pairs
            for block in zip(one.view(-1).split(BLOCK), other.view(-1).split(BLOCK), strict=True)
        ]
        self._progress: tuple[int, int | None] = (0, None)
        """Number of swapped blocks, and the block that is being swapped: one value, so never half changed."""
        kinds = {(one.dtype, one.device) for one, _ in self._blocks}
        size = max((one.numel() for one, _ in self._blocks), default=0)
        # All memory, before anything is written.
        self._buffers = {kind: torch.empty(2, size, dtype=kind[0], device=kind[1]) for kind in kinds}

    def swap(self) -> None:
        """Swap all pairs."""
        while self._progress[0] < len(self._blocks):
            self._swap_block(self._progress[0], swapped_then=self._progress[0] + 1)

    def undo(self) -> None:
        """Swap back all swapped blocks, also after an interruption."""
        swapped, interrupted = self._progress
        if interrupted is not None:
            for tensor, saved in zip(self._blocks[interrupted], self._buffer(interrupted), strict=True):
                tensor.copy_(saved)
            self._progress = (swapped, None)
        while self._progress[0] > 0:
            self._swap_block(self._progress[0] - 1, swapped_then=self._progress[0] - 1)

    def _swap_block(self, number: int, *, swapped_then: int) -> None:
        (one, other), (saved_one, saved_other) = self._blocks[number], self._buffer(number)
        saved_one.copy_(one)
        saved_other.copy_(other)
        self._progress = (self._progress[0], number)
        one.copy_(saved_other)
        other.copy_(saved_one)
        self._progress = (swapped_then, None)

    def _buffer(self, number: int) -> tuple[Tensor, Tensor]:
        block = self._blocks[number][0]
        buffer = self._buffers[block.dtype, block.device]
        return buffer[0, : block.numel()], buffer[1, : block.numel()]


def fingerprint(tensors: Iterable[Tensor]) -> list[int]:
    """Sum the bits of each float32 tensor: equal sums mean, but for rare coincidences, that nothing was written."""
    return [
        sum(int(block.view(torch.int32).sum(dtype=torch.int64)) for block in tensor.view(-1).split(BLOCK))
        for tensor in tensors
    ]
