"""Equal stretches of parameters that every rank has whole (DDP), so that an average costs each rank 4/N bytes."""

from __future__ import annotations

from torch import Tensor

from hf_radam.sharding.base import Sharding, rank, world_size


def stretch(numel: int, index: int, ranks: int) -> tuple[int, int]:
    """First element and length of a rank's share: `ceil(numel / ranks)` elements, fewer for the last ranks."""
    share = -(-numel // ranks)
    first = min(index * share, numel)
    return first, min(share, numel - first)


def in_memory_order(value: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor with its dimensions in the order in which they lie in memory, and that order."""
    strides = value.stride()
    order = tuple(sorted(range(value.dim()), key=lambda dim: -strides[dim]))
    return value.permute(order), order


class SlicedSharding(Sharding):
    """The same parameters on every rank, each rank having its share of each."""

    def live(self, name: str) -> Tensor:
        """This rank's stretch of the flattened tensor: a view of it.

        Raises:
            RuntimeError: if the parameter's elements do not fill a stretch of memory.
        """
        parameter = self.parameters[name].detach()
        first, length = stretch(parameter.numel(), rank(), world_size())
        return in_memory_order(parameter)[0].view(-1)[first : first + length]

    def held(self, name: str) -> Tensor:
        """The whole parameter."""
        whole: Tensor = self.parameters[name].detach()
        return whole

    def start(self, name: str) -> int:
        """First element of this rank's share."""
        return stretch(self.parameters[name].numel(), rank(), world_size())[0]

    def held_start(self, name: str) -> int:
        """Zero: it is whole."""
        return 0

    def _assemble(self, name: str, piece: Tensor, *, live: bool, everywhere: bool = True) -> Tensor | None:
        whole = super()._assemble(name, piece, live=live, everywhere=everywhere)
        if whole is None or not live:
            return whole
        # The shares follow the order in which the elements lie in memory.
        reordered, order = in_memory_order(self.parameters[name].detach())
        return whole.view(reordered.shape).permute([order.index(dim) for dim in range(len(order))])

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share, taken in the order in which the parameter lies in memory."""
        _, order = in_memory_order(self.parameters[name].detach())
        return super().cut(name, whole.permute(order).contiguous())

    def _write(self, name: str, piece: Tensor) -> None:
        self.parameters[name].copy_(self.gather(name, piece))
