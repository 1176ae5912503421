"""RAdam: `torch.optim.RAdam` with AdamW's (decoupled) weight decay."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_radam.optim.checks import check_hyperparameters, low_precision


class RAdam(torch.optim.RAdam):
    """`torch.optim.RAdam` with `decoupled_weight_decay=True`, always; same arithmetic, same state.

    RAdam replaces the warm-up of Adam by a factor that grows with the number of updates and depends on `beta2` alone:
    it reaches 0.9 after 58 updates at 0.95, 277 at 0.99 and 2737 at 0.999.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay: each update multiplies the weights by `1 - lr * weight_decay` first.
        foreach: use torch's multi-tensor kernels; torch decides when not given.
        master_weights: whether float32 master weights take the place of the parameters in the optimizer before its
            first update, as DeepSpeed has it: then their own dtype does not matter.

    Raises:
        ValueError: for a value out of range, NaN included.

    Warns:
        UserWarning: if a parameter is bf16 or fp16. The second moment is kept in the parameter's dtype, where it
            stalls: in bf16 with beta2 0.999 it never moves from 1.0 although it should fall to 0.017.

    Source:
        Liu et al. 2020, arXiv:1908.03265, algorithm 2, with the threshold of `torch.optim.RAdam` (rho_t > 5).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        master_weights: bool = False,
    ):
        self._master_weights = master_weights
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True, foreach=foreach
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and warn of parameters whose optimizer state would stall."""
        super().add_param_group(param_group)
        for param in [] if self._master_weights else low_precision(self.param_groups[-1]["params"]):
            warnings.warn(
                f"RAdam keeps its state in the parameters' dtype, and some are {param.dtype}: the second moment "
                "stalls there. Keep float32 parameters and train with bf16=True (autocast) instead.",
                stacklevel=3,
            )
            break
