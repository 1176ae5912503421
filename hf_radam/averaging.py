"""Keep an exponentially weighted average (EWA) of a model's weights while it trains.

The idea: at a constant learning rate the weights wander around a good point; their average is closer to it than any
single iterate (Zhang et al. 2025, arXiv:2410.21676). Every average here follows one rule,

    average += a_n * (theta_n - average),        a_1 = 1,

with `theta_n` the weights at the n-th averaging; the two windows differ only in the step size `a_n`
(`hf_radam.windows`). The first averaging copies the weights, so the initial weights
never enter, and there is no average before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_radam.host_average import AverageMover
from hf_radam.kernels.folding import Folding, Foldings
from hf_radam.kernels.plain import are_plain, sharing
from hf_radam.sharding import LocalSharding, Sharding
from hf_radam.windows import (
    DEFAULT_HALF_LIFE_RATIO,
    check_averaging,
    fixed_decay_step_size,
    growing_window_step_size,
    half_life_of,
)


def _plain(named_parameters: Iterable[tuple[str, Tensor]]) -> Sharding:
    """The sharding of tensors that are whole.

    Raises:
        ValueError: for a DTensor: FSDP2 keeps some gathered after a forward pass, which is not seen from here.
    """
    sharding = LocalSharding(named_parameters)
    if sharding.is_sharded:
        raise ValueError(
            "The parameters are sharded (DTensors): give WeightAverage(find_sharding(model)), with find_sharding from "
            "hf_radam.sharding, which knows when FSDP2 must gather them anew."
        )
    return sharding


class WeightAverage:
    """An fp32 average of a model's trainable parameters, on each rank of its own part of them.

    Args:
        named_parameters: pairs of (name, parameter), as `model.named_parameters()` gives them. A parameter that
            appears under several names (tied weights) is averaged once, under its first name. Frozen parameters
            (`requires_grad=False`) are left out of the arithmetic and of the swap, and keep their value. Or a
            `Sharding`, which says what of each parameter this rank averages: then every rank must make an average,
            and do with it what the others do.
        decay: decay per update for a fixed window, in (0, 1).
        half_life_ratio: half-life of a growing window, as a ratio of the updates since averaging began. The default,
            0.0625, when neither is given.
        every: average at each `every`-th update. Saves time; leaves the window as it is.
        start_step: number of updates to let pass first: averaging begins with update `start_step + every`.
        device: where the fp32 accumulators live; the parameter's own device when not given.

    Raises:
        ValueError: for both windows at once, a value out of range, a complex parameter, or nothing to average.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> average = WeightAverage(model.named_parameters(), decay=0.99)
        >>> average.update(1)
        True
        >>> with average.applied():
        ...     loss = model(torch.ones(1, 2))
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
        self.decay = decay
        self.half_life_ratio = half_life_ratio
        self.every = every
        self.start_step = start_step
        self.device = None if device is None else torch.device(device)
        self.num_averaged = 0
        """Averagings so far."""
        self.last_step = 0
        """Number of the update that `update` was last told of."""
        self.weight_sum = 0.0
        """Sum of all weights in units of the newest one's: the inverse of the last step size."""
        given = named_parameters
        self.sharding = given if isinstance(given, Sharding) else _plain(given)
        self._trained = self.sharding.trained
        for name in self._trained:
            if self.sharding.dtype(name).is_complex:
                dtype = self.sharding.dtype(name)
                raise ValueError(f"Parameter {name} is complex ({dtype}); an average is kept in float32.")
        if not self._trained:
            raise ValueError("There is no trainable parameter to average: every one has requires_grad=False.")
        self._averages: dict[str, Tensor] = {}
        self._applied = False
        self._now: dict[str, Tensor] | None = None
        self._foldings = Foldings()
        self._mover = AverageMover()

    @property
    def started(self) -> bool:
        """Whether there is an average: False before the first averaging."""
        return self.num_averaged > 0

    def step_size(self, step: int) -> float:
        """Weight that the parameters get if they are averaged in at update `step` (1 for the first)."""
        if not self.started:
            return 1.0
        if self.decay is not None:
            return fixed_decay_step_size(self.weight_sum, decay=self.decay, every=self.every)
        assert self.half_life_ratio is not None
        return growing_window_step_size(step - self.start_step, half_life_ratio=self.half_life_ratio, every=self.every)

    @property
    def half_life(self) -> float:
        """How far back the average looks, as of the last averaging: its half-life in updates, 0 for a copy.

        Raises:
            RuntimeError: before the first averaging.
        """
        if not self.started:
            raise RuntimeError("There is no average yet: ask `started` first.")
        return half_life_of(1.0 / self.weight_sum, every=self.every)

    @torch.no_grad()
    def update(self, step: int, *, overlap: bool = False) -> bool:
        """Take in the weights after update number `step` (1 for the first); call it after every update.

        Args:
            step: number of the update.
            overlap: where the average is in host memory and the weights are on a GPU, let that go on computing while
                the weights are copied. Call `before_writing()` before anything writes to them then. Without it the
                GPU waits for the copies, though this process does not.

        Returns:
            Whether this was an update at which the average moves: `step - start_step` positive and divisible by
            `every`.

        Raises:
            ValueError: if `step` is not above the last one.
            RuntimeError: inside `applied()`, if a parameter that was frozen has become trainable, or after `fold_into`
                if the update has another number or something has written to the weights since.
        """
        if self._applied:
            raise RuntimeError("update() inside applied() would average the average: leave the context first.")
        self._foldings.check_told(step, f"update({step})")
        if self._foldings.read and step == self.last_step:
            self._foldings.check_read()
            self._foldings.end()
            return True
        if step <= self.last_step:
            raise ValueError(f"update({step}) after update({self.last_step}): the number of the update must grow.")
        trained = set(self._trained)
        thawed = [name for name in self.sharding.parameters if name not in trained and self.sharding.trains(name)]
        if thawed:
            raise RuntimeError(f"{thawed[0]} was frozen when the average was made and trains now: make a new one.")
        due = self._average(step, overlap=overlap)
        self._foldings.end()
        return due

    def _average(self, step: int, *, overlap: bool) -> bool:
        """Take in the weights after an update, but for those that an optimizer has averaged in its pass."""
        moved = self._foldings.settle()
        self.last_step = step
        elapsed = step - self.start_step
        if elapsed <= 0 or elapsed % self.every:
            return False
        size = self.step_size(step)
        if self.started:
            self._move([name for name in self._averages if name not in moved], size)
            if not overlap:
                self.before_writing()
        else:
            self._averages = {
                name: self._accumulator(name, self.sharding.optimizer_shard(name)) for name in self._trained
            }
        self.weight_sum = 1.0 / size
        self.num_averaged += 1
        return True

    def _accumulator(self, name: str, value: Tensor) -> Tensor:
        """A float32 copy of a value, where the accumulator of that parameter lives."""
        device = self.sharding.optimizer_shard(name).device if self.device is None else self.device
        return value.detach().to(device=device, dtype=torch.float32, copy=True)

    def _move(self, names: list[str], size: float) -> None:
        """Move the accumulators of these parameters by `size` towards them."""
        parameters = self.sharding.parameters
        self._mover.move(
            [(self._averages[name], self.sharding.optimizer_shard(name), parameters[name]) for name in names], size
        )

    def before_writing(self) -> None:
        """Have the weights copied before anything that a GPU is asked from now on; see `update(overlap=True)`.

        Raises:
            RuntimeError: if something has written to them already.
        """
        self._mover.before_writing()

    def finish(self) -> None:
        """Have the average as the last update left it: whatever reads it does this by itself.

        Waits for one in host memory, and averages what is left of an update that has moved a part of it.
        """
        self._foldings.check_whole()
        step = self._foldings.step
        if step is not None and not self._foldings.read and not self._applied:
            self._average(step, overlap=False)
            self._note_read()
        self._mover.finish()

    # ---- In the optimizer's pass ----

    def fold_into(self, optimizer: Any, step: int) -> None:
        """Have the optimizer's next update, number `step`, move the average too, wherever it can.

        Call it before `optimizer.step()`, and `update(step)` after it as ever, which averages whatever the optimizer
        could not: the average is the same, bit for bit. Saves one of three streams of memory. Whatever writes to the
        weights between the two is not averaged: `update` raises where it sees that, but for writes to `p.data`.

        Args:
            optimizer: an `RAdam` or `RAdamScheduleFree` of this package; it folds what it fuses (`fused=True`) of
                float32 parameters on CPUs, but for parameters that share memory with others. Several optimizers may
                take part, each told before its own step.
            step: number of the update, as for `update`.

        Raises:
            RuntimeError: if `update` was not told of the last update that has moved the average.
        """
        self._foldings.check_told(step, f"fold_into(optimizer, {step})")
        optimizer.folding = None
        elapsed = step - self.start_step
        if self._applied or not self.started or step <= self.last_step or elapsed <= 0 or elapsed % self.every:
            return
        parameters = self.sharding.parameters
        plain = [name for name, parameter in parameters.items() if are_plain(parameter)]
        shared = {plain[n] for n in sharing([parameters[name] for name in plain])}
        pairs = {name: (parameters[name], self._averages[name]) for name in plain if name in self._averages}
        apart = {name: pair for name, pair in pairs.items() if name not in shared}
        whole = {name: pair for name, pair in apart.items() if pair[0].shape == pair[1].shape and are_plain(pair[1])}
        self._foldings.begin(optimizer, Folding(step, self.step_size(step), whole))

    def _note_read(self) -> None:
        """Take down the weights as they are, which are averaged before `update` was told of them."""
        self._foldings.note_read({name: self.sharding.parameters[name] for name in self._averages})

    @contextmanager
    def applied(self, *, exchange: bool = False) -> Iterator[None]:
        """Context in which the parameters hold the average; the training weights come back bit for bit.

        The average is cast to each parameter's dtype. It costs one copy of the trainable parameters while it lasts.
        What is written into the parameters inside the context is lost at its end.

        Args:
            exchange: let averages change places with float32 parameters on the same device, so that those are not
                copied. Inside the context nothing may be written into the parameters then.

        Raises:
            RuntimeError: before the first averaging (see `started`), or inside another `applied()`. At the end of a
                context with `exchange`, if something was written into the parameters.
        """
        if not self.started:
            raise RuntimeError(
                f"There is no average yet: the first comes with update {self.start_step + self.every}, "
                f"the last one seen is {self.last_step}. Ask `started` first."
            )
        if self._applied:
            raise RuntimeError("The average is in the parameters already: applied() cannot be nested.")
        self.finish()
        self._foldings.check_read()
        self._applied = True
        try:
            if exchange:
                with self.sharding.exchanging(self._averages) as self._now:
                    yield
            else:
                with self.sharding.holding(self._averages.items):
                    yield
        finally:
            self._applied, self._now = False, None
            if self._foldings.read:
                self._note_read()

    @property
    def averages(self) -> dict[str, Tensor]:
        """The float32 average of each parameter on this rank, wherever it is now."""
        self.finish()
        return self._averages if self._now is None else self._now

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The average under the parameters' names, frozen parameters as they are: copies, float32 where averaged.

        Raises:
            RuntimeError: before the first averaging.
        """
        if not self.started:
            raise RuntimeError("There is no average yet: ask `started` first.")
        gathered = {name: self.sharding.gather(name, average) for name, average in self.averages.items()}
        frozen = [name for name in self.sharding.parameters if name not in gathered]
        gathered |= {name: self.sharding.gather_model(name) for name in frozen}
        return {name: value.clone() for name, value in gathered.items()}

    def counters(self) -> dict[str, Any]:
        """Every number that the next `update` depends on, besides the averages: plain values for a JSON file."""
        return {
            "num_averaged": self.num_averaged,
            "last_step": self.last_step,
            "start_step": self.start_step,
            "weight_sum": self.weight_sum,
        }

    def state_dict(self) -> dict[str, Any]:
        """Counters and averages: `{"num_averaged": int, ..., "averages": {name: float32 tensor}}`.

        The tensors are no copies: later updates move them, and those from within `applied(exchange=True)` hold the
        training weights after it.

        Where a rank averages a part of a parameter the tensor is that part, in the form of `Sharding.optimizer_shard`.
        """
        return self.counters() | {"averages": dict(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`, of this rank or of whole parameters.

        The window and `every` stay those given at construction.

        Raises:
            ValueError: if the names or shapes are not those of the parameters; nothing is changed then.
        """
        self._mover.finish()
        missing_counters = sorted(set(self.counters()) - set(state))
        if missing_counters:
            raise ValueError(f"The state has no {', '.join(missing_counters)}: it is not a WeightAverage's.")
        averages: dict[str, Tensor] = state.get("averages", {})
        if state["num_averaged"] > 0:
            missing = sorted(set(self._trained) - set(averages))
            extra = sorted(set(averages) - set(self._trained))
            if missing or extra:
                raise ValueError(f"The state is of other parameters: missing {missing[:5]}, unknown {extra[:5]}.")
            own = {name: self._accumulator(name, self._own_part(name, averages[name])) for name in averages}
        else:
            own = {}
        self._foldings.end()
        self._averages, self._foldings = own, Foldings()
        for counter in self.counters():
            setattr(self, counter, state[counter])

    def _own_part(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a value that is whole, or that part already."""
        if value.shape == self.sharding.shape(name):
            return self.sharding.local_shard(name, value)
        part = self.sharding.optimizer_shard(name).shape
        if value.shape != part:
            raise ValueError(
                f"The state has {name} of shape {tuple(value.shape)}, the parameter has "
                f"{tuple(self.sharding.shape(name))}, of which {tuple(part)} on this rank."
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and pickle take over: no threads, and nothing that is under way."""
        self.finish()
        return self.__dict__ | {"_mover": AverageMover(), "_foldings": self._foldings.of_a_copy()}

    def __repr__(self) -> str:
        """Window and progress in one line."""
        window = f"decay={self.decay}" if self.decay is not None else f"half_life_ratio={self.half_life_ratio}"
        return f"WeightAverage({window}, every={self.every}, start_step={self.start_step}, seen={self.last_step})"
