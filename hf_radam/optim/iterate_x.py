"""x of a schedule-free optimizer, wherever y and z lie: each process computes it for its own part of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from hf_radam.optim.schedule_free import RAdamScheduleFree, x_from_y
from hf_radam.sharding import Sharding, find_sharding


def x_piece(sharding: Sharding, optimizer: RAdamScheduleFree) -> Callable[[str], Tensor | None]:
    """A function that computes this rank's part of x, of one parameter at a time.

    Args:
        sharding: where the parameters of the model lie that the optimizer trains.
        optimizer: the optimizer.

    Returns:
        From a parameter's name to x in the form of `Sharding.optimizer_shard`, or to None where x is what the parameter holds:
        the optimizer does not know it, there was no update yet, or the optimizer is in evaluation mode.
    """
    groups = sharding.groups(optimizer)

    def piece(name: str) -> Tensor | None:
        group = groups.get(name)
        z = None if group is None else sharding.state(name, optimizer, "z")
        if group is None or z is None or not group["train_mode"]:
            return None
        return x_from_y(sharding.optimizer_shard(name), z, group["betas"][0])

    return piece


def x_pieces(sharding: Sharding, optimizer: RAdamScheduleFree) -> Iterator[tuple[str, Tensor]]:
    """Name and part of x of every parameter in which x is not what it holds, one after another: see `x_piece`."""
    piece = x_piece(sharding, optimizer)
    for name in sharding.parameters:
        x = piece(name)
        if x is not None:
            yield name, x


def schedule_free_x(model: nn.Module, optimizer: RAdamScheduleFree) -> dict[str, Tensor]:
    """The evaluation weights x of `model`, computed without touching model or optimizer.

    Args:
        model: the model that trains.
        optimizer: its optimizer.

    Returns:
        Copies by parameter name (tied parameters once): x where the optimizer has made an update, else the
        parameter as it is. In evaluation mode, where the parameters hold x already, those.
    """
    sharding = find_sharding(model)
    x = {name: sharding.gather(name, piece) for name, piece in x_pieces(sharding, optimizer)}
    x |= {name: sharding.gather_model(name) for name in sharding.parameters if name not in x}
    return {name: x[name].clone() for name in sharding.parameters}
