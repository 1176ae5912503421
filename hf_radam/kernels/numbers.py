"""The numbers of an update, the same for all its parameters, in the forms that kernels want them in."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RAdamNumbers:
    """Of one rectified update of RAdam.

    Attributes:
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        factor: rectification of the learning rate, above 0.
        step: number of the update, 1 for the first.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    factor: float
    step: int

    def for_kernel(self) -> list[float]:
        """In the order of `radam` in `one_pass.cpp`."""
        beta1, beta2 = self.betas
        rate = self.lr * self.factor * math.sqrt(1 - beta2**self.step) / (1 - beta1**self.step)
        return [1 - beta1, beta2, 1 - beta2, self.eps, 1 - self.lr * self.weight_decay, rate]

    def for_adamw(self) -> dict[str, float]:
        """Learning rate, weight decay and eps with which an update of AdamW is this one.

        RAdam moves by `lr factor m^ sqrt(1 - beta2^t) / (sqrt(v) + eps)` and decays by `lr weight_decay`; AdamW moves
        by `lr m^ / (sqrt(v) / sqrt(1 - beta2^t) + eps)` and decays by the same product.
        """
        return {
            "lr": self.lr * self.factor,
            "weight_decay": self.weight_decay / self.factor,
            "eps": self.eps / math.sqrt(1 - self.betas[1] ** self.step),
        }


@dataclass(frozen=True)
class ScheduleFreeNumbers:
    """Of one rectified schedule-free update.

    Attributes:
        lr: learning rate, rectified.
        betas: beta1 interpolates between z and x, beta2 is the decay rate of the second moment.
        eps: added to the root of the second moment.
        weight_decay: taken at y.
        c: weight of z in the average x.
        step: number of the update, 1 for the first.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    c: float
    step: int

    def for_kernel(self) -> list[float]:
        """In the order of `schedule_free` in `one_pass.cpp` and of `on_gpu.schedule_free_update`."""
        beta1, beta2 = self.betas
        y_rate = self.lr * (beta1 * (1 - self.c) - 1)
        correction = 1 / (1 - beta2**self.step)
        return [beta2, 1 - beta2, correction, self.eps, self.weight_decay, self.c, y_rate, self.lr]


Numbers = RAdamNumbers | ScheduleFreeNumbers
