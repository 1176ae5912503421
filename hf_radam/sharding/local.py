"""Shardings whose shards are tensors of the model itself: complete parameters (one process, DDP) or rows (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from hf_radam.sharding.base import Sharding, canonical, rank, world_size


def local_tensor(value: Tensor) -> Tensor:
    """Return a tensor itself, or the local tensor of a DTensor; no copy."""
    detached = value.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def first_element(value: Tensor, name: str) -> int:
    """Return the index of this rank's first element in the flattened tensor.

    Raises:
        ValueError: if the tensor is sharded along another dimension than the first.
    """
    if not isinstance(value, DTensor):
        return 0
    dims = [dim for dim, placement in enumerate(value.placements) if not isinstance(placement, Replicate)]
    if not dims:
        return 0
    placement = value.placements[dims[0]]
    if len(dims) > 1 or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            f"Parameter {name} is sharded as {value.placements}; only sharding by rows (FSDP2) is supported, no tensor "
            "parallelism. Train with FSDP2, ZeRO or DDP."
        )
    # As torch.chunk divides: every rank but the last ones has the same number of rows.
    rows_per_rank = math.ceil(value.shape[0] / value.device_mesh.size(dims[0]))
    row = min(rows_per_rank * value.device_mesh.get_local_rank(dims[0]), value.shape[0])
    return row * math.prod(value.shape[1:])


class LocalSharding(Sharding):
    """Parameters as plain tensors or DTensors; one with several names is taken once, by its first.

    `modules` are those of the model: FSDP2 leaves some of them gathered after a forward pass without a backward pass.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        modules: Iterable[nn.Module] = (),
        device: torch.device | None = None,
    ):
        parameters: dict[str, Any] = {}
        seen: set[int] = set()
        for name, parameter in named_parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[canonical(name)] = parameter
                first_element(parameter, name)
        super().__init__(parameters, device=device)
        self._fsdp_modules = [module for module in modules if isinstance(module, FSDPModule)]

    @property
    def is_sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters.values())

    def optimizer_shard(self, name: str) -> Tensor:
        """Return the tensor itself, or its local rows."""
        return local_tensor(self.parameters[name])

    model_shard = optimizer_shard

    def optimizer_start(self, name: str) -> int:
        """Return the index of the first element of the local rows."""
        return first_element(self.parameters[name], name)

    def _is_complete(self, name: str, *, optimizer: bool) -> bool:
        return not isinstance(self.parameters[name], DTensor)

    def state(self, name: str, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """Return the local rows of the state."""
        state = super().state(name, optimizer, key)
        return None if state is None else local_tensor(state)

    def _write(self, name: str, shard: Tensor) -> None:
        # In place: optimizers, compiled graphs and FSDP know the address.
        self.optimizer_shard(name).copy_(shard)

    def _can_exchange(self, name: str, shard: Tensor) -> bool:
        weights = self.optimizer_shard(name)
        if shard.dtype != torch.float32 or weights.dtype != torch.float32 or shard.device != weights.device:
            return False
        return shard.shape == weights.shape and shard.is_contiguous() and weights.is_contiguous()

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Reshard FSDP2's modules: the next forward pass would use gathered parameters without reading the shards."""
        for module in self._fsdp_modules:
            module.reshard()
        yield

    def shared(self) -> Sharding:
        """Return equal slices of complete parameters, so that an average costs each rank 4/N bytes per element."""
        return self if self.is_sharded or world_size() == 1 else SlicedSharding(self.parameters, device=self.device)


def equal_slice(numel: int, index: int, ranks: int) -> tuple[int, int]:
    """Return start and length of a rank's slice: `ceil(numel / ranks)` elements, fewer for the last ranks."""
    share = -(-numel // ranks)
    start = min(index * share, numel)
    return start, min(share, numel - start)


class SlicedSharding(Sharding):
    """Parameters that are complete on every rank (DDP), each rank taking an equal slice of each."""

    def _slice(self, name: str) -> tuple[int, int]:
        return equal_slice(self.parameters[name].numel(), rank(), world_size())

    def optimizer_shard(self, name: str) -> Tensor:
        """Return this rank's slice of the flattened parameter: a view of one that is contiguous, else a copy."""
        start, length = self._slice(name)
        return self.model_shard(name).reshape(-1)[start : start + length]

    def model_shard(self, name: str) -> Tensor:
        """Return the complete parameter."""
        parameter: Tensor = self.parameters[name].detach()
        return parameter

    def optimizer_start(self, name: str) -> int:
        """Return the index of the slice's first element."""
        return self._slice(name)[0]

    def model_start(self, name: str) -> int:
        """Return zero."""
        return 0

    def _is_complete(self, name: str, *, optimizer: bool) -> bool:
        return not optimizer

    def _write(self, name: str, shard: Tensor) -> None:
        self.model_shard(name).copy_(self.gather(name, shard))
