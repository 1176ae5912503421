"""RAdamScheduleFree: RAdam that averages inside its own update, so that only a learning rate has to be set.

Three sequences, in the letters of Defazio et al. 2024 (arXiv:2405.15682): z is the base iterate, x the weighted
average of the z (the weights to evaluate and ship), y = beta1 x + (1 - beta1) z the point where gradients are taken.
The parameters hold y while training; x is never stored, as it is a function of y and z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import schedulefree
import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from hf_radam.kernels import fused_update, make_ready
from hf_radam.kernels.folding import Folding
from hf_radam.kernels.numbers import ScheduleFreeNumbers
from hf_radam.kernels.plain import Entry, together
from hf_radam.optim.checks import check_hyperparameters, low_precision
from hf_radam.optim.rectification import rectification

THRESHOLD = 4.0
"""Length of the second moment's average above which `schedulefree` rectifies, as the paper does."""
SMALLEST_BETA2 = 0.6
"""At and below it that length never exceeds 4, so RAdam never leaves its silent phase."""


def x_from_y(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """Compute x = (y - (1 - beta1) z) / beta1 as the interpolation that `schedulefree` uses (same rounding)."""
    return torch.lerp(y, z, 1 - 1 / beta1)


class RAdamScheduleFree(schedulefree.RAdamScheduleFree):
    """`schedulefree.RAdamScheduleFree` with its gaps closed: same update, same state, so either loads the other's.

    What differs: options are checked; a tensor `lr` works; `step()` leaves `p.grad` alone; `eval()` keeps y, so
    `train()` brings it back bit for bit (also as the context `evaluating()`).

    Args:
        params: parameters or parameter groups, in float32 or float64.
        lr: learning rate; a good start is 1 to 10 times AdamW's. Constant: a decaying one would not lower the weight
            of later iterates in x, only stop them from moving.
        betas: beta1 interpolates between z and x (0.9; 0.95 to 0.98 for long runs); beta2 is the decay rate of the
            second moment and sets how long RAdam warms up (0.99 for language models).
        eps: added to the root of the second moment.
        weight_decay: decay taken at y, times the learning rate.
        r: power of the update's number in the averaging weights.
        weight_lr_power: power of the largest learning rate so far in the averaging weights.
        foreach: use torch's multi-tensor kernels; not on CPUs, where they are loops.
        silent_sgd_phase: while RAdam's rectification is undefined (the first few updates) only gather the second
            moment; False takes plain SGD updates there.
        fused: make rectified updates in one pass over memory (`hf_radam.kernels`). That rounds otherwise than the
            multi-tensor kernels, in the last bit of each operation.
        master_weights: whether float32 master weights take the place of the parameters in the optimizer before its
            first update, as DeepSpeed has it: then their own dtype does not matter.

    Raises:
        ValueError: for a value out of range, NaN included: beta1 = 0 (x would be undefined), beta2 <= 0.6 (the
            silent phase would never end), or a bf16 or fp16 parameter (the state would lose every small update).

    Source:
        Defazio et al. 2024, arXiv:2405.15682; `schedulefree` 1.4, `RAdamScheduleFree`.
    """

    folding: Folding | None = None
    """The average that the next update moves in its own pass, where it is fused: see `WeightAverage.fold_into`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool = True,
        silent_sgd_phase: bool = True,
        *,
        fused: bool = False,
        master_weights: bool = False,
    ):
        self.fused = fused
        """Whether rectified updates are fused."""
        check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if betas[0] == 0.0:
            raise ValueError("beta1=0.0 leaves x undefined (x = (y - (1 - beta1) z) / beta1): take 0.9 to 0.98.")
        if betas[1] <= SMALLEST_BETA2:
            raise ValueError(
                f"beta2={betas[1]} never leaves RAdam's silent phase, which needs beta2 > {SMALLEST_BETA2}: take 0.99."
            )
        for name, value in (("r", r), ("weight_lr_power", weight_lr_power)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
        self._master_weights = master_weights
        self._y: dict[nn.Parameter, Tensor] = {}
        self.steps_by_parts = False
        """Whether one update comes as several calls of `step`, each with other parameters of a group (ZeRO-3)."""
        self._stepped: list[set[int]] = []
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            r=r,
            weight_lr_power=weight_lr_power,
            foreach=foreach,
            silent_sgd_phase=silent_sgd_phase,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; refuse parameters whose state would lose its small updates."""
        super().add_param_group(param_group)
        for param in [] if self._master_weights else low_precision(self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"RAdamScheduleFree keeps its state in the parameters' dtype, and {param.dtype} loses every small "
                "update there: keep float32 parameters and train with bf16=True (autocast) instead."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of y and z; `p.grad` is only read.

        Raises:
            RuntimeError: in evaluation mode, where the parameters hold x: call `train()` first; or with sparse
                gradients.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("step() in evaluation mode, where the parameters hold x: call optimizer.train() first.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.layout is not torch.strided for p in group["params"]):
                raise RuntimeError("RAdamScheduleFree does not support sparse gradients: use sparse=False layers.")
        folding, self.folding = self.folding, None
        for index, group in enumerate(self.param_groups):
            if not self.steps_by_parts:
                self._step_group(group, folding)
            elif group["params"]:
                self._step_group(group, folding, goes_on=self._goes_on(index, group))
        return loss

    def _goes_on(self, index: int, group: dict[str, Any]) -> bool:
        """Whether the group's update is under way: none of the parameters it has now has had its step in it."""
        self._stepped += [set() for _ in range(index + 1 - len(self._stepped))]
        now, stepped = {id(p) for p in group["params"]}, self._stepped[index]
        goes_on = bool(stepped) and not now & stepped
        self._stepped[index] = now | stepped if goes_on else now
        return goes_on

    def _step_group(self, group: dict[str, Any], folding: Folding | None, *, goes_on: bool = False) -> None:
        """Count the update, unless it goes on with further parameters, and move the parameters that are there."""
        step = group["k"] + (not goes_on)
        rectified = rectification(step, beta2=group["betas"][1], threshold=THRESHOLD)
        adaptive = rectified is not None
        factor = float(not group["silent_sgd_phase"]) if rectified is None else rectified
        if self.fused and adaptive:  # before anything is changed, as it may fail
            make_ready({(p.dtype, p.device) for p in group["params"]}, schedule_free=True)
        # As a Python number: a tensor's 0/0 below would be NaN where a float raises, and counters would become tensors.
        lr = float(group["lr"]) * factor
        group["scheduled_lr"] = lr
        group["lr_max"] = max(lr, group["lr_max"])
        weight = step ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] += weight * (not goes_on)
        c = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        group["k"] = step

        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "z" not in self.state[p]:
                self.state[p]["z"] = torch.clone(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if self.fused and adaptive:
            params = self._move_fused(params, group, folding, lr=lr, c=c)
        # One parameter at a time is the same arithmetic with less memory for temporaries; and on a CPU as fast, as the
        # multi-tensor kernels are loops there.
        at_once = group["foreach"] and not all(p.is_cpu for p in params)
        for chunk in [params] if at_once else [[p] for p in params]:
            self._move(chunk, group, lr=lr, c=c, adaptive=adaptive)

    def _move_fused(
        self, ys: list[Tensor], group: dict[str, Any], folding: Folding | None, *, lr: float, c: float
    ) -> list[Tensor]:
        """Update what a kernel can take; returns the rest of `ys`."""
        numbers = ScheduleFreeNumbers(lr, group["betas"], group["eps"], group["weight_decay"], c=c, step=group["k"])
        entries: list[Entry] = []
        for y in ys:
            assert y.grad is not None, "only these are updated"
            entries.append((y, y.grad, self.state[y]["z"], self.state[y]["exp_avg_sq"]))
        calls, rest = together(entries)
        for chosen in calls:
            fused_update(chosen, numbers, folding)
        return [entry[0] for entry in rest]

    def _move(self, ys: list[Tensor], group: dict[str, Any], *, lr: float, c: float, adaptive: bool) -> None:
        """Update the second moments, then y and z, of `ys` (tensors of any shapes)."""
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in ys if p.grad is not None]
        zs = [self.state[p]["z"] for p in ys]
        second_moments = [self.state[p]["exp_avg_sq"] for p in ys]
        torch._foreach_mul_(second_moments, beta2)
        torch._foreach_addcmul_(second_moments, grads, grads, value=1 - beta2)
        directions: Any = grads
        if adaptive:
            denominators = torch._foreach_div(second_moments, 1 - beta2 ** group["k"])
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, group["eps"])
            directions = torch._foreach_div(grads, [*denominators])
            del denominators
        if group["weight_decay"] and adaptive:
            torch._foreach_add_(directions, ys, alpha=group["weight_decay"])
        elif group["weight_decay"]:
            directions = torch._foreach_add(grads, ys, alpha=group["weight_decay"])
        torch._foreach_lerp_(ys, zs, weight=c)  # y, as the average takes in the old z
        torch._foreach_add_(ys, directions, alpha=lr * (beta1 * (1 - c) - 1))
        torch._foreach_sub_(zs, directions, alpha=lr)

    @torch.no_grad()
    def eval(self) -> None:
        """Write x into the parameters, keeping y; nothing if they hold x already."""
        for group in self.param_groups:
            if not group["train_mode"]:
                continue
            with ExitStack() as undo:
                undo.callback(self._restore, group)  # out of memory half-way: all of the group holds y again
                for p in group["params"]:
                    if "z" in self.state.get(p, {}):
                        y, x = p.detach().clone(), x_from_y(p, self.state[p]["z"], group["betas"][0])
                        self._y[p] = y
                        p.copy_(x)
                undo.pop_all()
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Write y back into the parameters: the kept one, bit for bit, unless the weights were changed meanwhile.

        After a change (or in a process that loaded a state saved in evaluation mode) the parameters are taken for x,
        as `schedulefree` does: y = beta1 x + (1 - beta1) z.
        """
        for group in self.param_groups:
            if group["train_mode"]:
                continue
            beta1 = group["betas"][0]
            for p in group["params"]:
                if "z" not in self.state.get(p, {}):
                    continue
                z, y = self.state[p]["z"], self._y.pop(p, None)
                if y is not None and torch.equal(p, x_from_y(y, z, beta1)):
                    p.copy_(y)
                else:
                    p.lerp_(z.to(p.device), 1 - beta1)
            group["train_mode"] = True

    @contextmanager
    def evaluating(self, *, write_x: bool = True) -> Iterator[None]:
        """Context in evaluation mode; the weights and the mode before it come back bit for bit.

        Args:
            write_x: False only changes the mode: for other weights that are in the parameters already.
        """
        modes = [group["train_mode"] for group in self.param_groups]
        try:
            if write_x:
                self.eval()
            for group in self.param_groups:
                group["train_mode"] = False
            yield
        finally:
            for group, mode in zip(self.param_groups, modes, strict=True):
                if write_x and mode:
                    self._restore(group)
                group["train_mode"] = mode

    @torch.no_grad()
    def _restore(self, group: dict[str, Any]) -> None:
        """Put the kept y of a group back, whatever is in the parameters now."""
        for p in group["params"]:
            if p in self._y:
                p.copy_(self._y.pop(p))

    def forget_training_weights(self) -> None:
        """Take the weights now in the parameters for x: evaluation mode, and no y to bring back."""
        self._y = {}
        for group in self.param_groups:
            group["train_mode"] = False

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and pickle take over."""
        return super().__getstate__() | {
            "fused": self.fused,
            "steps_by_parts": self.steps_by_parts,
            "_master_weights": self._master_weights,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state (`load_state_dict`, `copy.deepcopy`); a y kept by `eval()` is not part of it."""
        super().__setstate__(state)
        self._y, self._stepped = {}, []
