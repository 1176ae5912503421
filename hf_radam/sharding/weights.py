"""One kind of weights of a model (averaged ones, x, those of the forward pass), of which every rank has its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_radam.sharding.base import Sharding


@dataclass(frozen=True)
class Weights:
    """Weights by the names of the parameters.

    Attributes:
        sharding: where the parameters lie.
        piece: this rank's part of a parameter in the form of `Sharding.optimizer_shard`, or None, on every rank, where these
            weights are what the forward pass holds.
    """

    sharding: Sharding
    piece: Callable[[str], Tensor | None]

    @classmethod
    def of_forward_pass(cls, sharding: Sharding) -> Weights:
        """The weights that are in the model."""
        return cls(sharding, lambda name: None)

    def gather_to_rank0(self, name: str) -> Tensor | None:
        """Bring a whole parameter to the first rank; every rank must call it. See `Sharding.gather_to_rank0`."""
        return self.sharding.gather_to_rank0(name, self.piece(name))

    def stretch(self, name: str) -> tuple[int, Tensor]:
        """This rank's part of a parameter: its first element, in the flattened parameter, and the part."""
        piece = self.piece(name)
        if piece is None:
            return self.sharding.model_start(name), self.sharding.model_shard(name).detach()
        return self.sharding.optimizer_start(name), piece
