"""DeepSpeed ZeRO: the optimizer updates float32 weights that are partitioned, apart from those of the forward pass.

ZeRO-1 and 2 keep complete parameters for the forward pass on every rank and divide the float32 copies of a parameter
group, laid end to end, among the ranks; a parameter may lie on two of them, or not be on a rank at all. ZeRO-3 divides
every parameter by itself, and the forward pass gathers what it needs.

DeepSpeed's public functions return complete values only, so this uses its private ones (DeepSpeed 0.19).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_radam.sharding.base import Sharding, canonical


def zero_sharding(model: nn.Module, engine: Any, *, device: torch.device | None) -> Sharding:
    """Return the sharding of a model in DeepSpeed's `engine`.

    Raises:
        ValueError: for stage 0.
    """
    if engine.zero_optimization_stage() == 0:
        raise ValueError("DeepSpeed without ZeRO (stage 0) is not supported. Set zero_optimization.stage to 1, 2 or 3.")
    parameters = {canonical(name): parameter for name, parameter in model.named_parameters()}
    kind = FragmentSharding if engine.zero_optimization_stage() < 3 else PartitionSharding
    return kind(parameters, engine, device=device)


class FragmentSharding(Sharding):
    """ZeRO-1 and ZeRO-2."""

    def __init__(self, parameters: dict[str, Any], engine: Any, *, device: torch.device | None):
        super().__init__(parameters, device=device)
        self.engine = engine

    def optimizer_shard(self, name: str) -> Tensor:
        """Return the range of the parameter in this rank's float32 partition; it may be empty."""
        mapping = self.parameters[name]._hp_mapping
        if mapping is None:
            return torch.empty(0, dtype=torch.float32, device=self.parameters[name].device)
        fragment: Tensor = mapping.hp_fragment.detach()
        return fragment

    def model_shard(self, name: str) -> Tensor:
        """Return the complete parameter."""
        parameter: Tensor = self.parameters[name].detach()
        return parameter

    def optimizer_start(self, name: str) -> int:
        """Return the index of the first element of the range."""
        mapping = self.parameters[name]._hp_mapping
        return 0 if mapping is None else int(mapping.lp_fragment_address.start)

    def model_start(self, name: str) -> int:
        """Return zero."""
        return 0

    def state(self, name: str, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """Return the same range of the partition's state."""
        mapping, group = self.parameters[name]._hp_mapping, optimizer.param_groups[self._group_index[name]]
        state = optimizer.state.get(group["params"][0], {}).get(key)
        if state is None or mapping is None:
            return None if state is None else state[:0]
        address = mapping.hp_fragment_address
        return state.narrow(0, address.start, address.numel)

    @cached_property
    def _group_index(self) -> dict[str, int]:
        """Index of the group in whose partition each trainable parameter lies."""
        zero = self.engine.optimizer
        # The optimizer of ZeRO-1 in bf16 has another name for them.
        flattened = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
        index = {id(parameter): number for number, group in enumerate(flattened) for parameter in group}
        return {name: index[id(self.parameters[name])] for name in self.trained}

    def groups(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """Return the group in whose partition each parameter lies."""
        return {name: optimizer.param_groups[number] for name, number in self._group_index.items()}

    def _is_complete(self, name: str, *, optimizer: bool) -> bool:
        return not optimizer

    def _write(self, name: str, shard: Tensor) -> None:
        self.parameters[name].detach().copy_(self.gather(name, shard))


class PartitionSharding(Sharding):
    """ZeRO-3."""

    def __init__(self, parameters: dict[str, Any], engine: Any, *, device: torch.device | None):
        self.engine, self.optimizer = engine, engine.optimizer
        super().__init__(parameters, device=device)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the complete parameter; one that is not gathered has an empty shape itself."""
        return torch.Size(self.parameters[name].ds_shape)

    def _partition(self, name: str) -> tuple[int, int]:
        """Return start and length of this rank's partition without its padding."""
        parameter = self.parameters[name]
        length = parameter.ds_tensor.ds_numel
        start = min(length * self.optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
        return start, min(length, parameter.ds_numel - start)

    def optimizer_shard(self, name: str) -> Tensor:
        """Return the range of the parameter in this rank's float32 partition, without its padding."""
        partition, _ = self.optimizer._get_fp32_opt_state_partition(self.parameters[name], release_swap_buffers=True)
        shard: Tensor = partition.detach()[: self._partition(name)[1]]
        return shard

    def model_shard(self, name: str) -> Tensor:
        """Return the same range as it is gathered for the forward pass."""
        shard: Tensor = self.parameters[name].ds_tensor.detach()[: self._partition(name)[1]]
        return shard

    def optimizer_start(self, name: str) -> int:
        """Return the index of the first element of the range."""
        return self._partition(name)[0]

    def state(self, name: str, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """Return the same range of the optimizer's state."""
        index, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(self.parameters[name])]
        state = optimizer.state.get(self.optimizer.fp32_partitioned_groups_flat[index], {}).get(key)
        return None if state is None else state.narrow(0, offset, self._partition(name)[1])

    def groups(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """Return the group of the sub-group that each parameter belongs to."""
        zero = self.optimizer
        position = {name: zero.grad_position[zero.get_param_id(self.parameters[name])] for name in self.trained}
        return {name: optimizer.param_groups[zero.sub_group_to_group_id[sub[0]]] for name, sub in position.items()}

    def _is_complete(self, name: str, *, optimizer: bool) -> bool:
        return False

    def _write(self, name: str, shard: Tensor) -> None:
        self.model_shard(name).copy_(shard)

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Have DeepSpeed release gathered parameters, and gather its persistent (small) ones again afterwards."""
        self.optimizer._partition_all_parameters()
        try:
            yield
        finally:
            persistent = self.optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
