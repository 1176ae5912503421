"""RAdamScheduleFree: RAdam that averages inside its own step, so that only a learning rate has to be set.

Three sequences, in the letters of Defazio et al. 2024 (arXiv:2405.15682): z is the base iterate, x the weighted
average of the z (the weights to evaluate and ship), y = beta1 x + (1 - beta1) z the point where gradients are taken.
The parameters hold y while training; x is never stored, as it is a function of y and z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import schedulefree
import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from hf_radam.optim.fused import FusedMixin, group_for_fusing, local, schedule_free_step
from hf_radam.optim.radam import HYPERPARAMETERS, check_hyperparameters, low_precision, rectification
from hf_radam.sharding import Sharding, find_sharding

THRESHOLD = 4.0
"""As `schedulefree`; see `rectification`."""


def x_from_y(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """Compute x = (y - (1 - beta1) z) / beta1 as the interpolation that `schedulefree` uses (same rounding)."""
    return torch.lerp(y, z, 1 - 1 / beta1)


class RAdamScheduleFree(FusedMixin, schedulefree.RAdamScheduleFree):
    """`schedulefree.RAdamScheduleFree` with the same update rule and state, so either loads the state of the other.

    `step()` leaves `p.grad` alone; `eval()` keeps y, so `train()` brings it back bit for bit.

    Args:
        params: parameters or parameter groups, in float32 or float64.
        lr: learning rate, constant; a good start is 1 to 10 times that of AdamW.
        betas: beta1 interpolates between z and x (0.9; 0.95 to 0.98 for long runs); beta2 is the decay rate of the
            second moment and sets how long RAdam warms up (0.99 for language models).
        eps: added to the root of the second moment.
        weight_decay: decay taken at y, times the learning rate.
        r: power of the step's number in the averaging weights.
        weight_lr_power: power of the largest learning rate so far in the averaging weights.
        foreach: use torch's multi-tensor kernels for steps that are not fused; not on CPUs, where they are loops.
        silent_sgd_phase: only move the second moment while RAdam's rectification is undefined (the first few steps);
            False takes plain SGD steps there.
        fused: take rectified steps in one pass over memory, with C++ kernels on CPUs (built when first needed, and
            cached) or one from `torch.compile` on GPUs; else as for `RAdam`. It differs from unfused steps by
            roundings, so all ranks of a run must do the same.
        master_weights: whether float32 master weights replace the parameters before the first step, as in DeepSpeed.

    Raises:
        ValueError: for a value out of range, NaN included: beta1 = 0 (x would be undefined), beta2 <= 0.6 (the
            silent phase would never end), or a bf16 or fp16 parameter (the state would lose every small change).

    Source: Defazio et al. 2024, arXiv:2405.15682; `schedulefree` 1.4, `RAdamScheduleFree`.
    """

    own_kernels = True
    steps_by_parts = False
    """Whether one step comes as several calls of `step()`, each with other parameters of a group (ZeRO-3)."""

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
        fused: bool | None = None,
        master_weights: bool = False,
    ):
        self.fused = fused
        self._master_weights = master_weights
        self._y: dict[nn.Parameter, Tensor] = {}
        self._stepped: list[set[int]] = []
        super().__init__(params, lr, betas, eps, weight_decay, r, weight_lr_power, foreach, silent_sgd_phase)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; refuse parameters whose state would lose small changes."""
        group = {**self.defaults, **param_group}
        check_hyperparameters(**{name: group[name] for name in HYPERPARAMETERS})
        if group["betas"][0] == 0.0:
            raise ValueError("beta1=0.0 leaves x undefined (x = (y - (1 - beta1) z) / beta1). Take 0.9 to 0.98.")
        if group["betas"][1] <= 0.6:  # up to it rho_t never exceeds 4
            raise ValueError(
                f"beta2={group['betas'][1]} never leaves RAdam's silent phase. Take one above 0.6, such as 0.99."
            )
        for name in ("r", "weight_lr_power"):
            if not 0.0 <= group[name] < math.inf:
                raise ValueError(f"{name}={group[name]} must be a finite number, 0 or more.")
        super().add_param_group(param_group)
        dtype = None if self._master_weights else low_precision(self.param_groups[-1]["params"])
        if dtype is not None:
            self.param_groups.pop()
            raise ValueError(
                f"RAdamScheduleFree keeps its state in the parameters' dtype, and {dtype} loses every small change. "
                "Keep float32 parameters and train with bf16=True (autocast)."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move y and z; `p.grad` is only read.

        Raises:
            RuntimeError: in evaluation mode, where the parameters hold x, and for sparse gradients.
            ValueError: if `fused` is True and that is not possible.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("step() in evaluation mode, where the parameters hold x. Call optimizer.train() first.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.layout is not torch.strided for p in group["params"]):
                raise RuntimeError("RAdamScheduleFree does not support sparse gradients. Use sparse=False layers.")
        for index, group in enumerate(self.param_groups):
            if not self.steps_by_parts:
                self._step_group(group)
            elif group["params"]:
                self._step_group(group, continues=self._continues(index, group))
        return loss

    def _continues(self, index: int, group: dict[str, Any]) -> bool:
        self._stepped += [set() for _ in range(index + 1 - len(self._stepped))]
        now, stepped = {id(p) for p in group["params"]}, self._stepped[index]
        continues = bool(stepped) and not now & stepped
        self._stepped[index] = now | stepped if continues else now
        return continues

    def _step_group(self, group: dict[str, Any], *, continues: bool = False) -> None:
        """Count the step, unless it continues with further parameters, and move the present parameters."""
        step = group["k"] + (not continues)
        rectified = rectification(step, beta2=group["betas"][1], threshold=THRESHOLD)
        adaptive = rectified is not None
        factor = float(not group["silent_sgd_phase"]) if rectified is None else rectified
        fuses = adaptive and self._decide_fused()  # before anything is changed, as it may fail
        # As a Python number: a tensor's 0/0 below would be NaN where a float raises, and counters would become tensors.
        lr = float(group["lr"]) * factor
        group["scheduled_lr"] = lr
        group["lr_max"] = max(lr, group["lr_max"])
        weight = step ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] += weight * (not continues)
        c = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        group["k"] = step

        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "z" not in self.state[p]:
                self.state[p]["z"] = torch.clone(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if fuses:
            params = self._move_fused(params, group, lr=lr, c=c)
        # One parameter at a time needs less memory, and is as fast on a CPU, where multi-tensor kernels are loops.
        at_once = group["foreach"] and not all(p.is_cpu for p in params)
        for chunk in [params] if at_once else [[p] for p in params]:
            self._move(chunk, group, lr=lr, c=c, adaptive=adaptive)

    def _move_fused(self, ys: list[Tensor], group: dict[str, Any], *, lr: float, c: float) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        correction, y_rate = 1 / (1 - beta2 ** group["k"]), lr * (beta1 * (1 - c) - 1)
        scalars = [beta2, 1 - beta2, correction, group["eps"], group["weight_decay"], c, y_rate, lr]
        entries: list[Any] = [(y, y.grad, self.state[y]["z"], self.state[y]["exp_avg_sq"]) for y in ys]
        groups, rest = group_for_fusing(entries)
        for chosen in groups:
            schedule_free_step([[*map(local, column)] for column in zip(*chosen, strict=True)], scalars)
        return [entry[0] for entry in rest]

    def _move(self, ys: list[Tensor], group: dict[str, Any], *, lr: float, c: float, adaptive: bool) -> None:
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
        """Write x into the parameters, keeping y, unless they hold x already."""
        for group in self.param_groups:
            if not group["train_mode"]:
                continue
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    self._y[p] = p.detach().clone()
                    p.copy_(x_from_y(p, self.state[p]["z"], group["betas"][0]))
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Write y back into the parameters: bit for bit, unless the weights were changed meanwhile.

        Changed parameters, or those of a state saved in evaluation mode, are x, as in `schedulefree`.
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
        """Open a context in evaluation mode; the weights and the mode before it come back bit for bit.

        Args:
            write_x: False only changes the mode, where the parameters hold other weights.
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
                group["train_mode"] = mode
                kept = [p for p in group["params"] if p in self._y] if write_x and mode else []
                for p in kept:
                    p.detach().copy_(self._y.pop(p))

    def forget_training_weights(self) -> None:
        """Enter evaluation mode with the present parameters as x, and no y to restore."""
        self._y = {}
        for group in self.param_groups:
            group["train_mode"] = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set a state (`load_state_dict`, `copy.deepcopy`); a y kept by `eval()` is not part of it."""
        super().__setstate__(state)
        self._y, self._stepped = {}, []


def x_shard(sharding: Sharding, optimizer: RAdamScheduleFree) -> Callable[[str], Tensor | None]:
    """Return a function from a parameter's name to this rank's shard of x, shaped as `Sharding.optimizer_shard`.

    It returns None where the parameter holds x: untrained, before the first step, or in evaluation mode.
    """
    groups = sharding.groups(optimizer)

    def shard(name: str) -> Tensor | None:
        group = groups.get(name)
        z = None if group is None else sharding.state(name, optimizer, "z")
        if group is None or z is None or not group["train_mode"]:
            return None
        return x_from_y(sharding.optimizer_shard(name), z, group["betas"][0])

    return shard


def x_shards(sharding: Sharding, optimizer: RAdamScheduleFree) -> Iterator[tuple[str, Tensor]]:
    """Yield name and shard of x of every parameter that does not hold x, computed one after another."""
    shard = x_shard(sharding, optimizer)
    for name in sharding.parameters:
        if (x := shard(name)) is not None:
            yield name, x


def schedule_free_x(model: nn.Module, optimizer: RAdamScheduleFree) -> dict[str, Tensor]:
    """Compute the evaluation weights x of `model` without touching model or optimizer.

    Returns:
        Copies by parameter name (tied parameters once) of x, or of a parameter that holds x already.
    """
    sharding = find_sharding(model)
    x = {name: sharding.gather(name, shard) for name, shard in x_shards(sharding, optimizer)}
    x |= {name: sharding.gather_model(name) for name in sharding.parameters if name not in x}
    return {name: x[name].clone() for name in sharding.parameters}
