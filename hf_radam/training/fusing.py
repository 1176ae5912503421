"""Whether the optimizer's updates are fused: where that is asked for, or is possible and was measured to be faster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.utils import logging

from hf_radam.kernels import make_ready, obstacle
from hf_radam.kernels.building import BuildError
from hf_radam.optim import RAdam, RAdamScheduleFree
from hf_radam.sharding import LocalSharding, Sharding
from hf_radam.sharding.base import all_gather_object

logger = logging.get_logger(__name__)


def choose_fused(optimizer: Any, wanted: str, sharding: Sharding, *, speaks: bool) -> None:
    """Have the optimizer fuse its updates, and build what it needs for that; all processes must call this.

    Processes of one run do the same: kernels that round otherwise would let their copies of the weights drift apart.

    Args:
        optimizer: without wrappers; nothing is done to one that is not ours.
        wanted: `auto`, `true` or `false`.
        sharding: where the weights lie that the optimizer updates; it may know them as something else itself.
        speaks: whether this process logs what was decided.

    Raises:
        ValueError: if `true` was asked for and cannot be.
    """
    if not isinstance(optimizer, (RAdam, RAdamScheduleFree)):
        return
    optimizer.fused = False
    if wanted == "false":
        return
    parameters = [sharding.optimizer_shard(name) for name in sharding.trained]
    against = _first(all_gather_object(obstacle(parameters, measured=wanted == "auto")))
    seconds = 0.0
    if against is None:
        if speaks:
            logger.info("Building the kernels of fused updates, if this machine has not got them yet.")
        outcomes = all_gather_object(_make_ready(parameters, optimizer))
        against = _first(outcome for outcome in outcomes if isinstance(outcome, str))
        seconds = max((outcome for outcome in outcomes if isinstance(outcome, float)), default=0.0)
    if against is None:
        optimizer.fused = True
        if speaks:
            logger.info("The optimizer's updates are fused (ready after %.1f s).", seconds)
    elif wanted == "true":
        raise ValueError(f"fused_optimizer=true is not possible: {against}. Leave it out, or set it to false.")
    elif speaks:
        logger.warning("The optimizer's updates are not fused (fused_optimizer=auto): %s.", against)


def check_folded(optimizer: Any, sharding: Sharding) -> None:
    """Refuse to fold the average into the update where nothing of it can be.

    Args:
        optimizer: without wrappers, after `choose_fused`.
        sharding: of the parameters, as they are averaged.

    Raises:
        ValueError: if the update is not fused, or not of whole parameters on a CPU.
    """
    against = None
    if not optimizer.fused:
        against = "the optimizer's updates are not fused"
    elif not isinstance(sharding, LocalSharding) or sharding.is_sharded:
        against = "every process averages its share of the parameters alone"
    else:
        devices = {sharding.optimizer_shard(name).device.type for name in sharding.trained}
        against = next((f"it is made on CPUs only, and the model is on {device}" for device in devices - {"cpu"}), None)
    if against is not None:
        raise ValueError(f"ewa_folded=True is not possible: {against}. Leave it out, the average is the same.")


def _make_ready(parameters: list[Tensor], optimizer: RAdam | RAdamScheduleFree) -> float | str:
    """Seconds that building took, or why it failed."""
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    try:
        return make_ready(kinds, schedule_free=isinstance(optimizer, RAdamScheduleFree))
    except BuildError as error:
        return str(error)
    except Exception as error:  # of any of the many parts of a compiler
        return f"compiling failed ({type(error).__name__}: {str(error)[:200].strip()})"


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
