"""RAdam: `torch.optim.RAdam` with AdamW's (decoupled) weight decay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.radam import radam

from hf_radam.kernels import fused_update, make_ready
from hf_radam.kernels.folding import Folding
from hf_radam.kernels.numbers import RAdamNumbers
from hf_radam.kernels.plain import Entry, together
from hf_radam.optim.checks import check_hyperparameters, low_precision
from hf_radam.optim.rectification import rectification

ONE = torch.tensor(1.0)
"""Added to the counts of updates: of a Python number torch makes such a tensor anew for each of them."""
THRESHOLD = 5.0
"""Length of the second moment's average above which `torch.optim.RAdam` rectifies; the paper has 4."""


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
        fused: make rectified updates in one pass over memory (`hf_radam.kernels`). That rounds otherwise than the
            multi-tensor kernels, in the last bit of each operation.
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

    folding: Folding | None = None
    """The average that the next update moves in its own pass, where it is fused: see `WeightAverage.fold_into`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        fused: bool = False,
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
        super().add_param_group(param_group)
        for param in [] if self._master_weights else low_precision(self.param_groups[-1]["params"]):
            warnings.warn(
                f"RAdam keeps its state in the parameters' dtype, and some are {param.dtype}: the second moment "
                "stalls there. Keep float32 parameters and train with bf16=True (autocast) instead.",
                stacklevel=3,
            )
            break

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        """One update, as `torch.optim.RAdam` makes it; `p.grad` is only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        folding, self.folding = self.folding, None
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            first: list[Tensor] = []
            second: list[Tensor] = []
            steps: list[Tensor] = []
            has_complex = self._init_group(group, parameters, gradients, first, second, steps)
            entries: list[Entry] = [*zip(parameters, gradients, first, second, steps, strict=True)]
            plain = not (has_complex or group["maximize"] or group["capturable"] or group["differentiable"])
            if self.fused and plain and group["decoupled_weight_decay"]:
                make_ready({(p.dtype, p.device) for p in parameters}, schedule_free=False)
                entries = self._step_fused(entries, group, folding)
            if entries:
                self._step_unfused(entries, group, has_complex=has_complex)
        return loss

    def _step_unfused(self, entries: list[Entry], group: dict[str, Any], *, has_complex: bool) -> None:
        parameters, gradients, first, second, steps = (list(column) for column in zip(*entries, strict=True))
        radam(
            parameters,
            gradients,
            first,
            second,
            steps,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            has_complex=has_complex,
        )

    def _step_fused(self, entries: list[Entry], group: dict[str, Any], folding: Folding | None) -> list[Entry]:
        """Make the rectified updates that a kernel can make; returns the entries of the rest."""
        by_step: dict[int, list[Entry]] = {}
        for entry in entries:
            by_step.setdefault(int(entry[-1]) + 1, []).append(entry)
        rest: list[Entry] = []
        for step, of_a_step in by_step.items():
            factor = rectification(step, beta2=group["betas"][1], threshold=THRESHOLD)
            if factor is None:
                rest += of_a_step
                continue
            numbers = RAdamNumbers(
                float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], factor=factor, step=step
            )
            calls, unfit = together(of_a_step)
            rest += unfit
            for chosen in calls:
                fused_update(chosen, numbers, folding)
                torch._foreach_add_([entry[-1] for entry in chosen], ONE, alpha=1.0)
        return rest

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and pickle take over."""
        return super().__getstate__() | {"fused": self.fused, "_master_weights": self._master_weights}
