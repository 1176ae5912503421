"""RAdam: `torch.optim.RAdam` with AdamW's (decoupled) weight decay; and what both optimizers share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.radam import radam

from hf_radam.optim.fused import Entry, FusedMixin, group_for_fusing, local

THRESHOLD = 5.0
"""As `torch.optim.RAdam`; see `rectification`."""
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
COLUMNS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "state_steps")
OPTIONS = "lr weight_decay eps maximize foreach capturable differentiable decoupled_weight_decay".split()


def rectification(step: int, *, beta2: float, threshold: float) -> float | None:
    """Return the factor on the learning rate at a step (1 for the first), which replaces a warm-up.

    None while rho_t, the length of the second moment's moving average, is at most `threshold`: 4 in the paper (Liu et
    al. 2020, arXiv:1908.03265, algorithm 2) and in `schedulefree`, 5 in `torch.optim.RAdam`.
    """
    rho_inf = 2 / (1 - beta2) - 1
    beta2_t = beta2**step
    rho_t = rho_inf - 2 * step * beta2_t / (1 - beta2_t)
    if rho_t <= threshold:
        return None
    return ((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)) ** 0.5


def check_hyperparameters(*, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise `ValueError` for a value out of range, NaN included."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements. Pass one number.")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}={beta} must be at least 0 and below 1.")
    for name, value in (("lr", float(lr)), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number, 0 or more.")


def low_precision(params: list[Tensor]) -> torch.dtype | None:
    """Return the dtype of a parameter that has fewer bits than float32, None if there is none."""
    return next((p.dtype for p in params if p.is_floating_point() and torch.finfo(p.dtype).bits < 32), None)


class RAdam(FusedMixin, torch.optim.RAdam):
    """`torch.optim.RAdam` with `decoupled_weight_decay=True`, always; same arithmetic, same state.

    A factor replaces a warm-up: it reaches 0.9 after 58 steps for a `beta2` of 0.95, 277 for 0.99 and 2737 for 0.999.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay: each step multiplies the weights by `1 - lr * weight_decay` first.
        foreach: use torch's multi-tensor kernels for steps that are not fused; torch decides when not given.
        fused: take rectified steps in one pass over memory, by torch's fused AdamW: None wherever that is possible,
            True or raise `ValueError` at the first of them for a dtype or device without a kernel. Tensors that are
            not contiguous are never fused. It differs from unfused steps by roundings.
        master_weights: whether float32 master weights replace the parameters before the first step, as in DeepSpeed.

    Raises:
        ValueError: for a value out of range, NaN included.

    Warns:
        UserWarning: if a parameter is bf16 or fp16, the dtype of its second moment, which stalls there.

    Source: Liu et al. 2020, arXiv:1908.03265, algorithm 2, with the threshold of `torch.optim.RAdam` (rho_t > 5).
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
        fused: bool | None = None,
        master_weights: bool = False,
    ):
        self.fused = fused
        self._master_weights = master_weights
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True, foreach=foreach
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and warn of parameters whose optimizer state would stall."""
        check_hyperparameters(**{name: param_group.get(name, self.defaults[name]) for name in HYPERPARAMETERS})
        super().add_param_group(param_group)
        dtype = None if self._master_weights else low_precision(self.param_groups[-1]["params"])
        if dtype is not None:
            warnings.warn(
                f"RAdam keeps its state in the parameters' dtype, and some are {dtype}: the second moment stalls "
                "there. Keep float32 parameters and train with bf16=True (autocast) instead.",
                stacklevel=3,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        """Take one step as `torch.optim.RAdam` does; `p.grad` is only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            columns: dict[str, Any] = {name: [] for name in COLUMNS}
            has_complex = self._init_group(group, *columns.values())
            entries: list[Entry] = [*zip(*columns.values(), strict=True)]
            special = group["maximize"] or group["capturable"] or group["differentiable"]
            if not special and group["decoupled_weight_decay"]:
                entries = self._step_fused(entries, group)
            if entries:
                columns = {name: [*column] for name, column in zip(COLUMNS, zip(*entries, strict=True), strict=True)}
                options = {name: group[name] for name in OPTIONS}
                beta1, beta2 = group["betas"]
                radam(**columns, **options, beta1=beta1, beta2=beta2, has_complex=has_complex)
        return loss

    def _step_fused(self, entries: list[Entry], group: dict[str, Any]) -> list[Entry]:
        by_step: dict[int, list[Entry]] = {}
        for entry in entries:
            by_step.setdefault(int(entry[-1]) + 1, []).append(entry)
        rest: list[Entry] = []
        for step, at_step in by_step.items():
            factor = rectification(step, beta2=group["betas"][1], threshold=THRESHOLD)
            if factor is None or not self._decide_fused():
                rest += at_step
                continue
            groups, unfit = group_for_fusing(at_step)
            rest += unfit
            for chosen in groups:
                fused_step(chosen, group, step=step, factor=factor)
        return rest


def fused_step(entries: list[Entry], group: dict[str, Any], *, step: int, factor: float) -> None:
    """Take a rectified step with torch's fused AdamW, given one group of `group_for_fusing`.

    RAdam moves by `lr factor m^ sqrt(1 - beta2^t) / (sqrt(v) + eps)` and decays by `lr weight_decay`; AdamW moves by
    `lr m^ / (sqrt(v) / sqrt(1 - beta2^t) + eps)` and decays by the same product.
    """
    torch._foreach_add_([entry[4] for entry in entries], torch.tensor(1.0), alpha=1.0)
    parameters, gradients, first, second = ([local(entry[n]) for entry in entries] for n in range(4))
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        parameters,
        gradients,
        first,
        second,
        [],
        [torch.full((), float(step), device=parameters[0].device)] * len(entries),
        lr=float(group["lr"]) * factor,
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"] / factor,
        eps=group["eps"] / math.sqrt(1 - beta2**step),
        amsgrad=False,
        maximize=False,
    )
    # So that autograd notices graphs that are older than the weights: torch's kernel does not tell it.
    torch.autograd.graph.increment_version([*parameters, *first, *second])
