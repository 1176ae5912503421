"""Swap the contents of tensors in place, with little memory, so that whatever is raised half-way can be undone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

AT_A_TIME = 2**20
"""Elements that change places at a time."""


class Exchange:
    """Pairs of tensors whose contents change places, and back.

    Args:
        pairs: tensors of equal size, dtype and device, contiguous.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]):
        self._stretches = [
            stretch
            for one, other in pairs
            for stretch in zip(one.view(-1).split(AT_A_TIME), other.view(-1).split(AT_A_TIME), strict=True)
        ]
        self._at: tuple[int, int | None] = (0, None)
        """How many stretches have changed places, and which is doing so: one value, so never half changed."""
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for one, _ in self._stretches:  # all memory that this takes, before anything is written
            kind, size = (one.dtype, one.device), min(AT_A_TIME, max(s.numel() for s, _ in self._stretches))
            if kind not in self._kept:
                self._kept[kind] = torch.empty(2, size, dtype=one.dtype, device=one.device)

    def forth(self) -> None:
        """Let all change places."""
        while self._at[0] < len(self._stretches):
            self._swap(self._at[0], self._at[0] + 1)

    def back(self) -> None:
        """Undo what was done, all of it or the part before something was raised; the latest first."""
        done, half_way = self._at
        if half_way is not None:
            for tensor, kept in zip(self._stretches[half_way], self._room(half_way), strict=True):
                tensor.copy_(kept)
            self._at = (done, None)
        while self._at[0] > 0:
            self._swap(self._at[0] - 1, self._at[0] - 1)

    def _swap(self, number: int, done_then: int) -> None:
        one, other = self._stretches[number]
        kept_one, kept_other = self._room(number)
        kept_one.copy_(one)
        kept_other.copy_(other)
        self._at = (self._at[0], number)
        one.copy_(kept_other)
        other.copy_(kept_one)
        self._at = (done_then, None)

    def _room(self, number: int) -> tuple[Tensor, Tensor]:
        stretch = self._stretches[number][0]
        kept = self._kept[stretch.dtype, stretch.device]
        return kept[0, : stretch.numel()], kept[1, : stretch.numel()]


def fingerprint(tensors: Iterable[Tensor]) -> list[int]:
    """Sums of the bits of float32 tensors: another one where something was written, but for rare coincidences."""
    return [
        sum(int(stretch.view(torch.int32).sum(dtype=torch.int64)) for stretch in tensor.view(-1).split(AT_A_TIME))
        for tensor in tensors
    ]
