"""Whether the optimizer's updates are fused: where that is asked for, or is possible and worth its compiling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.utils import logging

from hf_radam.optim import RAdam, RAdamScheduleFree, fused
from hf_radam.sharding import Sharding
from hf_radam.sharding.base import of_every_rank

logger = logging.get_logger(__name__)


def choose_fused(optimizer: Any, wanted: str, sharding: Sharding, *, speaks: bool) -> None:
    """Have the optimizer fuse its updates, and compile what it needs for that; all processes must call this.

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
    count = sum(sharding.shape(name).numel() for name in sharding.trained)
    if wanted == "false" or (wanted == "auto" and count < fused.WORTH_IT):
        return
    parameters = [sharding.live(name) for name in sharding.trained]
    obstacle = _first(of_every_rank(fused.obstacle(parameters, measured=wanted == "auto")))
    seconds = 0.0
    if obstacle is None and isinstance(optimizer, RAdamScheduleFree):
        if speaks:
            logger.info("Compiling the fused update of RAdamScheduleFree; it is kept for later runs.")
        outcomes = of_every_rank(_compile(parameters))
        obstacle = _first(outcome for outcome in outcomes if isinstance(outcome, str))
        seconds = max((outcome for outcome in outcomes if isinstance(outcome, float)), default=0.0)
    if obstacle is None:
        optimizer.fused = True
        if speaks:
            logger.info("The optimizer's updates are fused (ready after %.1f s).", seconds)
    elif wanted == "true":
        raise ValueError(f"fused_optimizer=true is not possible: {obstacle}. Leave it out, or set it to false.")
    elif speaks:
        logger.warning("The optimizer's updates are not fused (fused_optimizer=auto): %s.", obstacle)


def _compile(parameters: list[Tensor]) -> float | str:
    """Seconds that compiling took, or why it failed."""
    try:
        return fused.compile_for({(parameter.dtype, parameter.device) for parameter in parameters})
    except Exception as error:  # of any of the many parts of a compiler
        return f"compiling failed ({type(error).__name__}: {str(error)[:200].strip()})"


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
