"""An average that moves in the update's pass over memory: two streams more, where a pass of its own has three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Folding:
    """What an optimizer needs for averaging the parameters that it updates next.

    Attributes:
        step: number of the update, 1 for the first.
        size: step size of the averages.
        averages: float32 average of each parameter that may be averaged so, of its shape and on its device.
        moved: the parameters whose average has moved, each with its version number after the update.
        spent: whether the update that it was for has been averaged: it moves nothing any more.
    """

    step: int
    size: float
    averages: dict[Tensor, Tensor]
    moved: dict[Tensor, int] = field(default_factory=dict)
    spent: bool = False

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The average of each parameter, None where there is none."""
        return [None if self.spent else self.averages.get(parameter) for parameter in parameters]

    def note(self, parameters: Sequence[Tensor]) -> None:
        """Take down that the averages of these have moved, with them."""
        if not self.spent:
            self.moved |= {parameter: parameter._version for parameter in parameters if parameter in self.averages}

    def changed(self) -> list[Tensor]:
        """Parameters that something has written to after their average moved."""
        return [parameter for parameter, version in self.moved.items() if parameter._version != version]
