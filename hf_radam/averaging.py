"""Keep an exponentially weighted average (EWA), an exponential moving average (EMA), of a model's weights.

At a constant learning rate the weights wander around a good point; their average is closer to it (Zhang et al. 2025,
arXiv:2410.21676). Every average here follows one rule,

    average += a_n * (theta_n - average),        a_1 = 1,

with `theta_n` the weights at the n-th averaging; the two windows differ only in the step size `a_n`. The first one
copies the weights, so the initial weights never enter, and there is no average before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_radam.optim import fused
from hf_radam.sharding import LocalSharding, Sharding

DEFAULT_HALF_LIFE_RATIO = 0.0625


def fixed_decay_step_size(weight_sum: float, *, decay: float, every: int) -> float:
    """Return the step size of the bias-corrected EWA with a fixed decay per step.

    The newest point has weight 1 and the older ones sum to `decay**every * weight_sum` (0 before the first averaging),
    so the n-th step size is `(1 - decay**every) / (1 - decay**(every * n))`. `every`, the steps between two averagings,
    does not change the window.
    """
    return 1.0 / (1.0 + decay**every * weight_sum)


def growing_window_step_size(elapsed: int, *, half_life_ratio: float, every: int) -> float:
    """Return the step size of an EWA whose half-life is `half_life_ratio` of the `elapsed` steps of averaging.

    `1 - 0.5**(every / (half_life_ratio * elapsed))`: the window grows with the run, so no horizon is needed.
    """
    return -math.expm1(-math.log(2.0) * every / (half_life_ratio * elapsed))


def check_averaging(
    *, decay: float | None, half_life_ratio: float | None, every: int, start_step: int, prefix: str = ""
) -> None:
    """Raise `ValueError` for options that no average can follow; `prefix` goes before their names."""
    ratio = f"{prefix}half_life_ratio={half_life_ratio}"
    if decay is not None and half_life_ratio is not None:
        raise ValueError(f"{prefix}decay={decay} and {ratio} are two windows for one average. Set one of them.")
    if decay is not None and not 0.0 < decay < 1.0:
        raise ValueError(f"{prefix}decay={decay} must lie strictly between 0 and 1, for instance 0.999.")
    if half_life_ratio is not None and not 0.0 < half_life_ratio <= 1.0:
        raise ValueError(f"{ratio} must be above 0 and at most 1, for instance {DEFAULT_HALF_LIFE_RATIO}.")
    for name, value, least in (("every", every, 1), ("start_step", start_step, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{prefix}{name}={value} must be a whole number of steps, {least} or more.")


@torch.no_grad()
def move_averages(averages: Sequence[Tensor], weights: Sequence[Tensor], size: float) -> None:
    """Move float32 averages by `size` of their distance towards weights of the same shapes, in place."""
    pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for average, weight in zip(averages, weights, strict=True):
        kernel = fused.average_kernel(average, weight)
        if kernel is None and (average.dtype is not weight.dtype or average.device != weight.device):
            average.lerp_(weight.to(average), size)
            continue
        of_kernel = pairs.setdefault(kernel or "torch", ([], []))
        of_kernel[0].append(average)
        of_kernel[1].append(weight)
    for name, (moved, towards) in pairs.items():
        if name == "torch":
            torch._foreach_lerp_(moved, towards, size)
        else:
            fused.call(name, (moved, towards), [size], written=moved)


class _HostCopies:
    """Copies of weights on a GPU in pinned host memory, made on a stream of their own while the GPU computes on."""

    def __init__(self, weights: Sequence[Tensor]):
        self.buffers = [torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True) for weight in weights]
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="hf_radam-average")
        self._device = weights[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._arrived = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps

    def start(self, weights: Sequence[Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for weight, buffer in zip(weights, self.buffers, strict=True):
                buffer.copy_(weight, non_blocking=True)
                weight.record_stream(self._stream)  # its memory is not reused before it was read
        self._arrived.record(self._stream)

    def block_stream(self) -> None:  # no work submitted from now on starts before the copies are made
        torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def wait(self) -> None:
        self._arrived.synchronize()


def host_copies(weights: Sequence[Tensor], averages: Sequence[Tensor]) -> _HostCopies | None:
    """Return buffers for weights on one GPU with averages in host memory, else None."""
    on_one_gpu = weights[0].is_cuda and len({weight.device for weight in weights}) == 1
    return _HostCopies(weights) if on_one_gpu and all(average.is_cpu for average in averages) else None


class WeightAverage:
    """An fp32 average of a model's trainable parameters; each rank averages its own shards.

    Args:
        named_parameters: `model.named_parameters()`; tied weights are averaged once, under their first name, frozen
            parameters left out. Or a `Sharding`: then all ranks must make the same calls.
        decay: decay per step for a fixed window, in (0, 1).
        half_life_ratio: half-life of a growing window, as a ratio of the steps since averaging began (0.0625).
        every: average at each `every`-th step; does not change the window.
        start_step: steps to skip: averaging begins with step `start_step + every`.
        device: where the fp32 averages are kept; the parameter's own device when not given.

    Raises:
        ValueError: for both windows at once, a value out of range, a complex parameter, or nothing to average.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Sharding,
        *,
        decay: float | None = None,
        half_life_ratio: float | None = None,
        every: int = 1,
        start_step: int = 0,
        device: torch.device | str | None = None,
    ):
        if decay is None and half_life_ratio is None:
            half_life_ratio = DEFAULT_HALF_LIFE_RATIO
        check_averaging(decay=decay, half_life_ratio=half_life_ratio, every=every, start_step=start_step)
        self.decay, self.half_life_ratio = decay, half_life_ratio
        self.every, self.start_step = every, start_step
        self.device = None if device is None else torch.device(device)
        self.num_averaged = 0
        self.last_step = 0  # that `update` was called with
        self.weight_sum = 0.0  # of all points, in units of the newest one's weight: the inverse of the last step size
        if isinstance(named_parameters, Sharding):
            self.sharding = named_parameters
        else:
            self.sharding = local = LocalSharding(named_parameters)
            if local.is_sharded:  # FSDP2 keeps some gathered after a forward pass, which is not seen from here
                raise ValueError("The parameters are sharded. Pass find_sharding(model), from hf_radam.sharding.")
        if not self.sharding.trained:
            raise ValueError("There is no trainable parameter to average: every one has requires_grad=False.")
        for name in self.sharding.trained:
            if self.sharding.dtype(name).is_complex:
                raise ValueError(f"Parameter {name} is complex, and an average is kept in float32. Freeze it.")
        self._averages: dict[str, Tensor] = {}
        self._applied = False
        self._exchanged: dict[str, Tensor] | None = None
        self._job: Future[None] | None = None
        self._versions: dict[str, int] = {}  # of the parameters that are being copied to host memory

    @property
    def started(self) -> bool:
        """Whether there is an average."""
        return self.num_averaged > 0

    @property
    def half_life(self) -> float:
        """Steps over which the last averaging halves older points: 0 at the first averaging, an error before it."""
        self._check_started()
        size = 1.0 / self.weight_sum
        return 0.0 if size == 1.0 else -self.every * math.log(2.0) / math.log1p(-size)

    @torch.no_grad()
    def update(self, step: int, *, overlap: bool = False) -> bool:
        """Average the weights after step number `step` (1 for the first); call it after every step.

        With `overlap` and an average in host memory, a GPU computes on while the weights are copied; then call
        `wait_for_copies()` before anything writes to them.

        Returns:
            Whether the average moves: `step - start_step` is positive and divisible by `every`.
        """
        if self._applied:
            raise RuntimeError("update() inside applied() would average the average. Leave the context first.")
        if step <= self.last_step:
            raise ValueError(f"update({step}) after update({self.last_step}): the number of the step must grow.")
        trained = {*self.sharding.trained}
        thawed = [name for name in self.sharding.parameters if name not in trained and self.sharding.trains(name)]
        if thawed:
            raise RuntimeError(f"{thawed[0]} was frozen when the average was made and trains now. Make a new one.")
        self.last_step = step
        elapsed = step - self.start_step
        if elapsed <= 0 or elapsed % self.every:
            return False
        if self.started:
            size = self._step_size(elapsed)
            self._move(size)
            if not overlap:
                self.wait_for_copies()
        else:
            size = 1.0
            shards = {name: self.sharding.optimizer_shard(name) for name in self.sharding.trained}
            self._averages = {name: self._average_of(name, shard) for name, shard in shards.items()}
        self.weight_sum = 1.0 / size
        self.num_averaged += 1
        return True

    def _step_size(self, elapsed: int) -> float:
        if self.decay is not None:
            return fixed_decay_step_size(self.weight_sum, decay=self.decay, every=self.every)
        assert self.half_life_ratio is not None
        return growing_window_step_size(elapsed, half_life_ratio=self.half_life_ratio, every=self.every)

    @cached_property
    def _copies(self) -> _HostCopies | None:
        return host_copies([*map(self.sharding.optimizer_shard, self._averages)], [*self._averages.values()])

    def _move(self, size: float) -> None:
        self.finish()
        averages, copies = [*self._averages.values()], self._copies
        weights = [self.sharding.optimizer_shard(name) for name in self._averages]
        if copies is None:
            return move_averages(averages, weights, size)
        self._versions = {name: self.sharding.parameters[name]._version for name in self._averages}
        copies.start(weights)

        def move() -> None:
            copies.wait()
            move_averages(averages, copies.buffers, size)

        self._job = copies.thread.submit(move)

    def _average_of(self, name: str, value: Tensor) -> Tensor:
        device = self.sharding.optimizer_shard(name).device if self.device is None else self.device
        return value.detach().to(device=device, dtype=torch.float32, copy=True)

    def wait_for_copies(self) -> None:
        """Have a GPU copy the weights before any work submitted from now on; see `update(overlap=True)`.

        Raises:
            RuntimeError: if something has written to them already; writes to `p.data` are not noticed.
        """
        versions, self._versions = self._versions, {}
        if versions and self._copies is not None:
            self._copies.block_stream()
        written = [name for name, version in versions.items() if self.sharding.parameters[name]._version != version]
        if written:
            raise RuntimeError(
                f"Something has written to {written[0]} while it was being copied to its average in host memory. Leave "
                "out ewa_device, or write in on_pre_optimizer_step or on_optimizer_step."
            )

    def finish(self) -> None:
        """Wait until an average in host memory has moved; methods that read the average do this."""
        self.wait_for_copies()
        job, self._job = self._job, None
        if job is not None:
            job.result()

    @contextmanager
    def applied(self, *, exchange: bool = False) -> Iterator[None]:
        """Open a context in which the parameters hold the average; the training weights come back bit for bit.

        The average is cast to each parameter's dtype. Values written into the parameters are lost at the end.

        Args:
            exchange: swap averages and float32 parameters on the same device instead of copying them. Then writing to
                the parameters raises `RuntimeError` at the end.

        Raises:
            RuntimeError: before the first averaging (see `started`), or inside another `applied()`.
        """
        self._check_started()
        if self._applied:
            raise RuntimeError("The average is in the parameters already: applied() cannot be nested.")
        self.finish()
        self._applied = True
        swap = self.sharding.exchanging(self._averages) if exchange else self.sharding.holding(self._averages.items)
        try:
            with swap as self._exchanged:
                yield
        finally:
            self._applied, self._exchanged = False, None

    def _check_started(self) -> None:
        if not self.started:
            first = self.start_step + self.every
            raise RuntimeError(f"There is no average yet: the first comes with step {first}. Ask `started` first.")

    @property
    def averages(self) -> dict[str, Tensor]:
        """This rank's float32 averages by name, wherever they are now."""
        self.finish()
        return self._averages if self._exchanged is None else self._exchanged

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return copies of the average by the parameters' names, frozen parameters as they are; collective."""
        self._check_started()
        gathered = {name: self.sharding.gather(name, average) for name, average in self.averages.items()}
        gathered |= {
            name: self.sharding.gather_model(name) for name in self.sharding.parameters if name not in gathered
        }
        return {name: value.clone() for name, value in gathered.items()}

    def counters(self) -> dict[str, Any]:
        """Return the numbers that the next `update` depends on, for JSON."""
        return {name: getattr(self, name) for name in ("num_averaged", "last_step", "start_step", "weight_sum")}

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and, under `averages`, this rank's float32 averages by name, without copying them."""
        return self.counters() | {"averages": dict(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict()` of this rank, or of full parameters; the window and `every` stay as they are.

        Raises:
            ValueError: for other names or shapes than those of the parameters.
        """
        self.finish()
        if not {*self.counters(), "averages"} <= {*state}:
            raise ValueError(f"A state with the keys {[*state]} is not that of a WeightAverage.")
        averages, trained = state["averages"], self.sharding.trained if state["num_averaged"] else []
        wrong = {*averages} ^ {*trained}
        if wrong:
            raise ValueError(f"The state is of other parameters: {min(wrong)} is only in one of the two.")
        self._averages = {name: self._average_of(name, self._shard(name, averages[name])) for name in trained}
        for counter in self.counters():
            setattr(self, counter, state[counter])

    def _shard(self, name: str, value: Tensor) -> Tensor:
        full, shard = self.sharding.shape(name), self.sharding.optimizer_shard(name).shape
        if value.shape == full:
            return self.sharding.local_shard(name, value)
        if value.shape != shard:
            raise ValueError(f"The state has {name} of shape {tuple(value.shape)}, the parameter has {tuple(full)}.")
        return value
