"""An average that moves in the update's pass over memory: two streams more, where a pass of its own has three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class WrittenError(RuntimeError):
    """Something has written to a parameter between its update and its average.

    Args:
        name: of the parameter.
    """

    def __init__(self, name: str):
        super().__init__(
            f"Something has written to {name} between the optimizer's update and its average, which was made in one "
            "pass with the update: leave out fold_into (ewa_folded), and load a state from before it."
        )


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

    def end(self) -> None:
        """Have it move nothing any more."""
        self._spent = True

    def check(self) -> None:
        """Make sure that the parameters are those that their averages have moved with.

        Raises:
            WrittenError: if something has written to one of them since.
        """
        for parameter, version in self._moved.items():
            if parameter._version != version:
                raise WrittenError(self._names[parameter])


class Foldings:
    """What has moved of one average in the update that is under way, until the average is told of that update."""

    def __init__(self) -> None:
        self._all: list[Folding] = []
        self._read: dict[str, tuple[Tensor, int]] | None = None
        self._broken: str | None = None

    @property
    def step(self) -> int | None:
        """The number of the update, once a part of the average has moved with it."""
        return next((folding.step for folding in self._all if folding.moved), None)

    @property
    def moved(self) -> set[str]:
        """The names of the parameters whose average has moved with the update."""
        return {name for folding in self._all for name in folding.moved}

    @property
    def read(self) -> bool:
        """Whether all of the average has moved already, for a reader who came before it was told of the update."""
        return self._read is not None

    def begin(self, optimizer: Any, folding: Folding) -> None:
        """Have an optimizer's next update move what a folding says."""
        if self._all and self._all[0].step != folding.step:
            self.end()
        self._all.append(folding)
        optimizer.folding = folding

    def settle(self) -> set[str]:
        """Have nothing move any more, as the update is averaged now.

        Returns:
            As `moved`.

        Raises:
            WrittenError: if something has written to one of them since; what has moved is no average then, for good.
        """
        for folding in self._all:
            folding.end()
        try:
            for folding in self._all:
                folding.check()
        except WrittenError as error:
            self._broken = str(error)
            raise
        return self.moved

    def note_read(self, parameters: Mapping[str, Tensor]) -> None:
        """Take down the parameters, by their names, as a reader has had all of them averaged."""
        self._read = {name: (parameter, parameter._version) for name, parameter in parameters.items()}

    def check_read(self) -> None:
        """Make sure that the parameters are those that a reader has had averaged.

        Raises:
            WrittenError: if something has written to one of them since; what has moved is no average then, for good.
        """
        for name, (parameter, version) in (self._read or {}).items():
            if parameter._version != version:
                error = WrittenError(name)
                self._broken = str(error)
                raise error

    def check_whole(self) -> None:
        """Raise what was raised when the average was found to be none.

        Raises:
            RuntimeError: likewise.
        """
        if self._broken is not None:
            raise RuntimeError(self._broken)

    def check_told(self, step: int, call: str) -> None:
        """Make sure that no other update has moved a part of the average, which was not told of it.

        Raises:
            RuntimeError: if one has; or as `check_whole`.
        """
        self.check_whole()
        begun = self.step
        if begun is not None and begun != step:
            raise RuntimeError(f"{call} without update({begun}), which has moved the average already: call it first.")

    def end(self) -> None:
        """Have nothing move any more, and forget what has: the average was told of the update."""
        for folding in self._all:
            folding.end()
        self._all, self._read = [], None

    def of_a_copy(self) -> Foldings:
        """For a copy of the average: its parameters are others, which no optimizer is told to move anything with."""
        copied = Foldings()
        copied._read = None if self._read is None else {}
        return copied
