"""An average that moves in the update's pass over memory: two streams more, where a pass of its own has three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class Folding:
    """What an optimizer needs for averaging the parameters that it updates next.

    Args:
        step: number of the update, 1 for the first.
        size: step size of the averages.
        pairs: by its name a parameter, and its float32 average, of its shape; both plain tensors on a CPU.
    """

    def __init__(self, step: int, size: float, pairs: Mapping[str, tuple[Tensor, Tensor]]):
        self.step = step
        self.size = size
        self._names = {parameter: name for name, (parameter, _) in pairs.items()}
        self._averages = dict(pairs.values())
        self._moved: dict[Tensor, int] = {}
        self._spent = False

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The average of each parameter that is to move with it, None where there is none."""
        return [None if self._spent else self._averages.get(parameter) for parameter in parameters]

    def note(self, parameters: Sequence[Tensor]) -> None:
        """Take down that the averages of these have moved, with the parameters as they are now."""
        if not self._spent:
            self._moved |= {parameter: parameter._version for parameter in parameters if parameter in self._averages}

    @property
    def moved(self) -> set[str]:
        """The names of the parameters whose average has moved with the update."""
        return {self._names[parameter] for parameter in self._moved}

    def settle(self, step: int) -> set[str]:
        """End it, as the update is averaged now: it moves nothing any more.

        Args:
            step: number of the update that is averaged.

        Returns:
            As `moved`.

        Raises:
            RuntimeError: if it was another update that moved them, or something has written to one of them since.
        """
        self._spent = True
        if self._moved and step != self.step:
            raise RuntimeError(f"update({step}) after fold_into(optimizer, {self.step}).")
        for parameter, version in self._moved.items():
            if parameter._version != version:
                raise RuntimeError(
                    f"Something has written to {self._names[parameter]} between the optimizer's update and its "
                    "average, which was made in one pass with the update: leave out fold_into (ewa_folded)."
                )
        return self.moved
