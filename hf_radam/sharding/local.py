"""Parameters whose tensors on this rank are what trains: whole ones (one process, DDP), or rows of them (DTensors)."""

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

from hf_radam.sharding.base import Sharding, canonical, world_size


def local_part(value: Tensor) -> Tensor:
    """What this rank has of a tensor: the tensor itself, or the local part of a DTensor; no copy."""
    detached = value.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def first_element(value: Tensor, name: str) -> int:
    """First element of this rank's rows, in the flattened tensor.

    Raises:
        ValueError: if the tensor is sharded otherwise than by rows.
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
    # As torch.chunk cuts: every rank but the last ones has the same number of rows.
    ranks = value.device_mesh.size(dims[0])
    rows_per_rank = math.ceil(value.shape[0] / ranks)
    row = min(rows_per_rank * value.device_mesh.get_local_rank(dims[0]), value.shape[0])
    return row * math.prod(value.shape[1:])


class LocalSharding(Sharding):
    """Parameters as plain tensors or DTensors.

    Args:
        named_parameters: names and parameters; one that appears under several names is taken once, by its first.
        modules: the model's modules, of which FSDP2 keeps some gathered after a forward pass without a backward one.
        device: as for `Sharding`.
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
        self._gathering = [module for module in modules if isinstance(module, FSDPModule)]

    @property
    def is_sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters.values())

    def optimizer_shard(self, name: str) -> Tensor:
        """The tensor itself, or its local rows."""
        return local_part(self.parameters[name])

    model_shard = optimizer_shard

    def optimizer_start(self, name: str) -> int:
        """First element of the local rows."""
        return first_element(self.parameters[name], name)

    def _is_whole(self, name: str, *, live: bool) -> bool:
        return not isinstance(self.parameters[name], DTensor)

    def state(self, name: str, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """The local part of the state."""
        state = super().state(name, optimizer, key)
        return None if state is None else local_part(state)

    def _write(self, name: str, piece: Tensor) -> None:
        # In place: the addresses stay what optimizers, compiled graphs and FSDP know.
        self.optimizer_shard(name).copy_(piece)

    def _can_exchange(self, name: str, piece: Tensor) -> bool:
        live = self.optimizer_shard(name)
        if piece.dtype != torch.float32 or live.dtype != torch.float32 or piece.device != live.device:
            return False
        return piece.shape == live.shape and piece.is_contiguous() and live.is_contiguous()

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Have FSDP2 let go of what it keeps gathered."""
        # What is gathered already would be used as it is in the next forward pass, without a look at its shards.
        for module in self._gathering:
            module.reshard()
        yield

    def shared(self) -> Sharding:
        """Equal stretches of whatever is whole on every rank."""
        from hf_radam.sharding.slices import SlicedSharding

        return self if self.is_sharded or world_size() == 1 else SlicedSharding(self.parameters, device=self.device)
