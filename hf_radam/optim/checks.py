"""Check the options that both optimizers share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def check_hyperparameters(*, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise `ValueError` for a value with which no update is defined, NaN included."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements: give one number.")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"lr={float(lr)} must be a finite number, 0 or more.")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}={beta} must be at least 0 and below 1.")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be a finite number, 0 or more.")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} must be a finite number, 0 or more.")


def low_precision(params: list[Any]) -> Iterator[Tensor]:
    """The parameters whose dtype has fewer bits than float32."""
    for param in params:
        if isinstance(param, Tensor) and param.is_floating_point() and torch.finfo(param.dtype).bits < 32:
            yield param
