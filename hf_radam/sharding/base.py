"""What every kind of sharding can do: see the package's docstring for the idea."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_radam.sharding.exchange import Exchange, fingerprint

Pieces = Iterable[tuple[str, Tensor]]
"""Names of parameters, and this rank's stretch of a value for each, in the form of `Sharding.optimizer_shard`."""

Stretches = list[tuple[int, int]]
"""First element and length of what each rank has."""

WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def canonical(name: str) -> str:
    """A parameter's name without what wrappers around modules put into it."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather_object(value: Any) -> list[Any]:
    """What each process gives, by its number; all of them must call this."""
    if world_size() == 1:
        return [value]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, value)
    return every


def _from_all(piece: Tensor, numel: int, stretches: Stretches, *, everywhere: bool) -> Tensor | None:
    """Put a flattened tensor together, where the ranks have about as much of it each, in one collective operation."""
    sent = piece.new_zeros(max(length for _, length in stretches))
    sent[: piece.numel()] = piece
    parts = [torch.empty_like(sent) for _ in stretches] if everywhere or rank() == 0 else None
    if everywhere:
        dist.all_gather(parts, sent)
    else:
        dist.gather(sent, parts, dst=0)
    if parts is None:
        return None
    whole = piece.new_empty(numel)
    for part, (start, length) in zip(parts, stretches, strict=True):
        whole[start : start + length] = part[:length]
    return whole


def _from_owners(piece: Tensor, numel: int, stretches: Stretches, *, everywhere: bool) -> Tensor | None:
    """The same where few ranks have all of it (ZeRO-1, 2): each sends what it has, and nobody makes room for more."""
    me = rank()
    whole = piece.new_empty(numel) if everywhere or me == 0 else None
    for owner, (start, length) in enumerate(stretches):
        if not length:
            continue
        stretch = piece if whole is None else whole[start : start + length]
        if owner == me and whole is not None:
            stretch.copy_(piece)
        if everywhere:
            dist.broadcast(stretch, src=owner)
        elif owner == me and me != 0:
            dist.send(stretch, dst=0)
        elif owner != 0 and me == 0:
            dist.recv(stretch, src=owner)
    return whole


class Sharding(ABC):
    """The parameters of a model by name, tied ones once, and this rank's stretch of each.

    Args:
        parameters: every parameter by its canonical name.
        device: where a tensor must lie to be sent to other processes; None: where it is.
    """

    def __init__(self, parameters: dict[str, Any], *, device: torch.device | None = None):
        self.parameters = parameters
        self.device = device
        self.trained = [name for name in parameters if self.trains(name)]
        """Names of the parameters that trained when this was made: what is averaged, and what is sent, goes by them."""

    # ---- One parameter ----

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter."""
        return torch.Size(self.parameters[name].shape)

    def trains(self, name: str) -> bool:
        """Whether the parameter is trained now."""
        return bool(self.parameters[name].requires_grad)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the weights that the forward pass uses."""
        dtype: torch.dtype = self.parameters[name].dtype
        return dtype

    @abstractmethod
    def optimizer_shard(self, name: str) -> Tensor:
        """The stretch of a trained parameter on this rank, as the optimizer has it: the tensor itself, no copy."""

    @abstractmethod
    def model_shard(self, name: str) -> Tensor:
        """The stretch of any parameter on this rank, as the forward pass has it: the tensor itself, no copy."""

    @abstractmethod
    def optimizer_start(self, name: str) -> int:
        """First element of `optimizer_shard`, in the flattened parameter."""

    def model_start(self, name: str) -> int:
        """First element of `model_shard`, in the flattened parameter."""
        return self.optimizer_start(name)

    def state(self, name: str, optimizer: torch.optim.Optimizer, key: str) -> Tensor | None:
        """What the optimizer keeps for `optimizer_shard` under `key`, of the same form; None if it keeps nothing yet."""
        return optimizer.state.get(self.parameters[name], {}).get(key)

    def groups(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """The optimizer's parameter group of every parameter that it trains."""
        of = {p: group for group in optimizer.param_groups for p in group["params"]}
        return {name: of[parameter] for name, parameter in self.parameters.items() if parameter in of}

    def check(self) -> None:
        """Compare, of every trained parameter, what the optimizer has with what the forward pass has.

        Raises:
            RuntimeError: if they are not the same weights: a back-end keeps them in another order than is known here.
        """
        for name in self.trained:
            live, held = self.optimizer_shard(name).flatten(), self.model_shard(name).flatten()
            offset = self.optimizer_start(name) - self.model_start(name)
            same = held[offset : offset + live.numel()]
            if not torch.allclose(live.to(same.device, same.dtype), same, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(
                    f"The weights of {name} that the optimizer has on rank {rank()} are not those of the forward pass, "
                    "so averages and x would be of other weights: please report this, with the versions and the "
                    "configuration of the back-end."
                )

    # ---- Whole tensors ----

    @cached_property
    def _stretches(self) -> dict[tuple[str, bool], Stretches]:
        """Start and length of what every rank holds of every parameter, `optimizer_shard` and `model_shard`; asked for once."""
        mine, trained = {}, set(self.trained)
        for name in self.parameters:
            mine[name, False] = (self.model_start(name), self.model_shard(name).numel())
            if name in trained:
                mine[name, True] = (self.optimizer_start(name), self.optimizer_shard(name).numel())
        every = all_gather_object(mine)
        return {key: [ranks[key] for ranks in every] for key in mine}

    def gather(self, name: str, piece: Tensor) -> Tensor:
        """Put a value together of which every rank has the stretch that `optimizer_shard` is. Every rank must call it.

        Args:
            name: the parameter that the value has the shape of.
            piece: this rank's stretch, of any dtype and device.

        Returns:
            The whole value, on every rank; where nothing had to be sent, `piece` itself.
        """
        whole = self._assemble(name, piece, live=True)
        assert whole is not None
        return whole

    def gather_model(self, name: str) -> Tensor:
        """The whole parameter as the forward pass has it, as `gather`."""
        whole = self._assemble(name, self.model_shard(name).detach(), live=False)
        assert whole is not None
        return whole

    def gather_to_rank0(self, name: str, piece: Tensor | None) -> Tensor | None:
        """Put a value together on the first rank alone; the others get None. Every rank must call it.

        Args:
            name: the parameter that the value has the shape of.
            piece: this rank's stretch of it in the form of `optimizer_shard`; None on every rank: the parameter as the forward
                pass has it.
        """
        if piece is None:
            return self._assemble(name, self.model_shard(name).detach(), live=False, everywhere=False)
        return self._assemble(name, piece, live=True, everywhere=False)

    def _assemble(self, name: str, piece: Tensor, *, live: bool, everywhere: bool = True) -> Tensor | None:
        shape = self.shape(name)
        if self._is_whole(name, live=live):
            return piece.view(shape) if everywhere or rank() == 0 else None
        stretches = self._stretches[name, live]
        piece = piece.reshape(-1).to(self.device or piece.device)
        longest = max(length for _, length in stretches)
        if longest * len(stretches) > 2 * shape.numel():
            whole = _from_owners(piece, shape.numel(), stretches, everywhere=everywhere)
        else:
            whole = _from_all(piece, shape.numel(), stretches, everywhere=everywhere)
        return None if whole is None else whole.view(shape)

    @abstractmethod
    def _is_whole(self, name: str, *, live: bool) -> bool:
        """Whether every rank has all of `optimizer_shard`, or of `model_shard`, so that there is nothing to send."""

    def local_shard(self, name: str, whole: Tensor) -> Tensor:
        """This rank's stretch of a value of the parameter's shape, in the form of `optimizer_shard`: a view where that can be."""
        live = self.optimizer_shard(name)
        return whole.reshape(-1)[self.optimizer_start(name) : self.optimizer_start(name) + live.numel()].view(
            live.shape
        )

    # ---- Other weights in the model ----

    @abstractmethod
    def _write(self, name: str, piece: Tensor) -> None:
        """Have the forward pass use a value, given in the form of `optimizer_shard`, cast to the dtype of its weights."""

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Context in which `model_shard` may be changed, so that the next forward pass sees it."""
        yield

    @contextmanager
    def holding(self, pieces: Callable[[], Pieces]) -> Iterator[None]:
        """Context in which the forward pass uses other values; its own come back bit for bit, whatever is raised.

        Args:
            pieces: makes the values, in the form of `optimizer_shard`; asked one after another, each before it is written.
        """
        kept: dict[str, Tensor] = {}
        try:
            with torch.no_grad(), self.editing():
                for name, piece in pieces():
                    kept[name] = self.model_shard(name).detach().clone()
                    self._write(name, piece)
            yield
        finally:
            with torch.no_grad(), self.editing():
                for name, value in reversed(kept.items()):  # some may be the same memory
                    self.model_shard(name).copy_(value)

    @contextmanager
    def exchanging(self, pieces: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """As `holding`, without a copy of the weights where that can be: value and weights change places meanwhile.

        Args:
            pieces: the values, in the form of `optimizer_shard`. Of those that changed places the tensor here has the weights.

        Yields:
            Where each value is now.

        Raises:
            RuntimeError: at the end, if something has written to the model's weights meanwhile: that is in the
                values now. The weights are put back all the same. Nothing is raised where something else was.
        """
        exchanged = {
            name: self.model_shard(name).detach() for name, piece in pieces.items() if self._can_exchange(name, piece)
        }
        exchange = Exchange((weights, pieces[name]) for name, weights in exchanged.items())
        copied = {name: piece for name, piece in pieces.items() if name not in exchanged}
        with self.holding(copied.items):
            try:
                with torch.no_grad(), self.editing():
                    before = fingerprint(pieces[name] for name in exchanged)
                    exchange.forth()
                yield copied | exchanged
            finally:
                with torch.no_grad(), self.editing():
                    exchange.back()
                    for name, weights in exchanged.items():
                        if self.model_shard(name).data_ptr() != weights.data_ptr():  # moved, or cast to another dtype
                            self.model_shard(name).copy_(weights)
            after = fingerprint(pieces[name] for name in exchanged)
            written = [name for name, one, other in zip(exchanged, before, after, strict=True) if one != other]
            if written:
                raise RuntimeError(
                    f"Something wrote to {written[0]} while it held other weights than its own, which have changed "
                    "with that; its own are back. Copy the model before changing it."
                )

    def _can_exchange(self, name: str, piece: Tensor) -> bool:
        """Whether the forward pass uses the tensor `optimizer_shard`, and it and the value could as well change places."""
        return False

    def shared(self) -> Sharding:
        """A sharding in which every rank has its share of what this one has whole on every rank."""
        return self
