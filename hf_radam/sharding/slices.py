"""Equal stretches of parameters that every rank has whole (DDP), so that an average costs each rank 4/N bytes."""

from __future__ import annotations

from torch import Tensor

from hf_radam.sharding.base import Sharding, rank, world_size


def stretch(numel: int, index: int, ranks: int) -> tuple[int, int]:
    """First element and length of a rank's share: `ceil(numel / ranks)` elements, fewer for the last ranks."""
    share = -(-numel // ranks)
    first = min(index * share, numel)
    return first, min(share, numel - first)


class SlicedSharding(Sharding):
    """The same parameters on every rank, each rank having its share of each.

    A parameter whose elements do not lie in their order in memory is not cut: every rank has all of it.
    """

    def _stretch(self, name: str) -> tuple[int, int]:
        parameter = self.parameters[name]
        if not parameter.is_contiguous():
            return 0, parameter.numel()
        return stretch(parameter.numel(), rank(), world_size())

    def optimizer_shard(self, name: str) -> Tensor:
        """This rank's stretch of the flattened tensor: a view of it."""
        whole, (first, length) = self.model_shard(name), self._stretch(name)
        return whole.view(-1)[first : first + length] if whole.is_contiguous() else whole

    def model_shard(self, name: str) -> Tensor:
        """The whole parameter."""
        whole: Tensor = self.parameters[name].detach()
        return whole

    def optimizer_start(self, name: str) -> int:
        """First element of this rank's share."""
        return self._stretch(name)[0]

    def model_start(self, name: str) -> int:
        """Zero: it is whole."""
        return 0

    def _is_whole(self, name: str, *, live: bool) -> bool:
        return not live or not self.parameters[name].is_contiguous()

    def _write(self, name: str, piece: Tensor) -> None:
        self.model_shard(name).copy_(self.gather(name, piece))
