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
        piece: this rank's part of a parameter in the form of `Sharding.live`, or None, on every rank, where these
            weights are what the forward pass holds.
    """

    sharding: Sharding
    piece: Callable[[str], Tensor | None]

    @classmethod
    def of_forward_pass(cls, sharding: Sharding) -> Weights:
        """The weights that are in the model."""
        return cls(sharding, lambda name: None)

    def collect(self, name: str) -> Tensor | None:
        """Bring a whole parameter to the first rank; every rank must call it. See `Sharding.collect`."""
        return self.sharding.collect(name, self.piece(name))

    def stretch(self, name: str) -> tuple[int, Tensor]:
        """This rank's part of a parameter: its first element, in the flattened parameter, and the part."""
        piece = self.piece(name)
        if piece is None:
            return self.sharding.held_start(name), self.sharding.held(name).detach()
        return self.sharding.start(name), piece
