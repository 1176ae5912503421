"""How large a comparison is: model, data, horizons, learning rates, seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

HORIZONS = (0.25, 0.5, 1.0)
"""Ratios of the longest run at which every method must have a good model."""
DECAY = 0.2
"""Length of a decay, as a ratio of the horizon that it ends at."""
LARGER_BETA2 = (0.98, 0.99)
"""With which it is shown what a longer warm-up does to RAdam."""
EVALUATIONS = 20
"""Evaluations in the longest run; every horizon and every beginning of a decay is one of them."""


@dataclass(frozen=True)
class Settings:
    """One comparison.

    Attributes:
        updates: of the longest run; a multiple of `EVALUATIONS`.
        sequences: of an update.
        block: tokens of a sequence.
        vocabulary: entries of the tokenizer.
        width: of the llama, a multiple of 4.
        layers: of the llama.
        evaluated: blocks of the validation text, the same for all runs.
        rates: learning rates that each arm begins with; more are added until the best is not at an end.
        seeds: of weights and of the order of the data; the rates are chosen with the first.
        weight_decay: of every run.
        beta2: of every run; it also sets how long RAdam warms up, which must be short beside the first horizon.
        warmup: updates at which the tuning of AdamW's begins, for every horizon; RAdam has none, but where it is shown
            what one does.
        train_file: text to train on, as for `run_clm.py`; the source of the Python standard library if None.
        device: cpu, or cuda for what accelerate finds.
        bf16: whether to compute in bf16.
    """

    updates: int = 1060
    sequences: int = 32
    block: int = 128
    vocabulary: int = 1024
    width: int = 64
    layers: int = 3
    evaluated: int = 200
    rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "adamw": (4e-3, 8e-3, 1.6e-2),
            "radam": (4e-3, 8e-3, 1.6e-2),
            "radam_schedulefree": (8e-3, 1.6e-2, 3.2e-2),
        }
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    weight_decay: float = 0.1
    beta2: float = 0.95
    warmup: int = 106
    train_file: str | None = None
    device: str = "cpu"
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("updates", "sequences", "block", "vocabulary", "width", "layers", "evaluated", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.updates % EVALUATIONS:
            raise ValueError(f"updates={self.updates} must be a multiple of {EVALUATIONS}: every horizon is evaluated.")
        if 2 * self.warmup > self.horizons[0]:
            raise ValueError(
                f"warmup={self.warmup} must be at most half of the first horizon, {self.horizons[0]} updates."
            )
        if self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4: the model has four heads.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be one or more, each once.")
        for arm, rates in self.rates.items():
            if len(set(rates)) < max(3, len(rates)) or not all(0 < rate < math.inf for rate in rates):
                raise ValueError(f"rates of {arm}, {rates}: give at least three learning rates above 0, each once.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device} must be cpu or cuda.")

    @property
    def horizons(self) -> tuple[int, ...]:
        """The horizons in updates."""
        return tuple(round(ratio * self.updates) for ratio in HORIZONS)

    @property
    def interval(self) -> int:
        """Updates between two evaluations."""
        return self.updates // EVALUATIONS

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return dataclasses.asdict(self)


QUICK = Settings(
    updates=60,
    warmup=6,
    sequences=8,
    width=32,
    layers=2,
    evaluated=10,
    seeds=(0,),
    rates={
        "adamw": (8e-3, 1.6e-2, 3.2e-2),
        "radam": (8e-3, 1.6e-2, 3.2e-2),
        "radam_schedulefree": (1.6e-2, 3.2e-2, 6.4e-2),
    },
)
"""To see that it runs."""
