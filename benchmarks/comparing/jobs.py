"""The trainings of a comparison, each a command line of `run_clm.py`.

The runs of RAdam at a constant rate are trunks: their raw weights and their average are read at every horizon, and runs
with WSD branch from their checkpoints with `--extend_from`, only to decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .settings import DECAY, Settings

AVERAGED = {"ewa": True, "ewa_eval_raw": True}


class Point(NamedTuple):
    """What is tuned.

    Attributes:
        rate: the learning rate.
        warmup: updates of a linear warm-up.
        beta2: in place of that of the comparison.
    """

    rate: float
    warmup: int = 0
    beta2: float | None = None


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: path of its folder, below that of the comparison.
        flags: what `run_clm.py` is told, besides what all jobs are told.
        point: what is tuned.
        seed: of the weights and the order of the data.
        ends: number of its last update.
        begins: number of updates that were done before, by the run that it branches from.
        trunk: the job that it branches from.
    """

    name: str
    flags: tuple[tuple[str, Any], ...]
    point: Point
    seed: int
    ends: int
    begins: int = 0
    trunk: str | None = None

    @property
    def cost(self) -> int:
        """Updates that it makes itself."""
        return self.ends - self.begins


def _job(
    method: str, ends: int, point: Point, seed: int, *, begins: int = 0, trunk: str | None = None, **flags: Any
) -> Job:
    """A job whose folder is named after its method, what is tuned, and seed; without checkpoints unless flags ask."""
    told = {"max_steps": ends, "learning_rate": point.rate, "seed": seed, "save_strategy": "no"} | flags
    folder = f"rate_{point.rate:g}/seed_{seed}"
    if point.warmup:
        folder, told["warmup_steps"] = f"warmup_{point.warmup}/{folder}", point.warmup
    if point.beta2 is not None:
        folder, told["adam_beta2"] = f"beta2_{point.beta2:g}/{folder}", point.beta2
    return Job(f"{method}/{folder}", tuple(told.items()), point, seed, ends, begins, trunk)


def cosine(settings: Settings, horizon: int, point: Point, seed: int) -> Job:
    """AdamW with warm-up and a cosine to zero at a horizon, which it must know."""
    flags = {"optim": "adamw_torch_fused", "lr_scheduler_type": "cosine"}
    return _job(f"adamw_cosine/{horizon}", horizon, point, seed, **flags)


def _constant(point: Point) -> dict[str, Any]:
    return {"lr_scheduler_type": "constant_with_warmup" if point.warmup else "constant"}


def trunk(settings: Settings, point: Point, seed: int) -> Job:
    """RAdam at a constant rate, with the average; checkpoints where a decay may begin."""
    saving = {"save_strategy": "steps", "save_steps": branching(settings, settings.horizons[0])}
    flags = {"optim": "radam", **_constant(point), **AVERAGED, **saving}
    return _job("radam_constant", settings.updates, point, seed, **flags)


def branching(settings: Settings, horizon: int) -> int:
    """Update at which the decay to a horizon begins."""
    return horizon - round(DECAY * horizon)


def branch(settings: Settings, horizon: int, point: Point, seed: int) -> Job:
    """The decay of WSD to a horizon, from a checkpoint of the trunk."""
    begin, source = branching(settings, horizon), trunk(settings, point, seed)
    flags = {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": horizon - begin, **AVERAGED}
    return _job(f"radam_wsd/{horizon}", horizon, point, seed, begins=begin, trunk=source.name, **flags)


def several_budgets(settings: Settings, point: Point, seed: int) -> Job:
    """WSD-S: one run that decays to every horizon and goes on."""
    budgets = {"budgets": settings.horizons[:-1], "decay_steps": DECAY}
    return _job("radam_wsd_s", settings.updates, point, seed, optim="radam", lr_scheduler_type="wsd_s", **budgets)


def schedule_free(settings: Settings, point: Point, seed: int) -> Job:
    """RAdamScheduleFree: one run at a constant rate, evaluated at x."""
    flags = {"optim": "radam_schedulefree", **_constant(point)}
    return _job("radam_schedulefree", settings.updates, point, seed, **flags)


def command(job: Job, settings: Settings, folder: str) -> list[str]:
    """The flags of `run_clm.py` for a job, whose folder lies below `folder`."""
    overrides = {
        "hidden_size": settings.width,
        "intermediate_size": settings.width * 8 // 3 // 4 * 4,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": "true",
    }
    told: dict[str, Any] = {
        "model_type": "llama",
        "config_overrides": ",".join(f"{name}={value}" for name, value in overrides.items()),
        "vocab_size": settings.vocabulary,
        "block_size": settings.block,
        "max_eval_samples": settings.evaluated,
        "per_device_train_batch_size": settings.sequences,
        "per_device_eval_batch_size": 50,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "eval_strategy": "steps",
        "eval_steps": settings.interval,
        "logging_steps": max(1, settings.interval // 5),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": settings.device == "cpu",
        "bf16": settings.bf16,
        "output_dir": f"{folder}/{job.name}",
        **dict(job.flags),
    }
    if settings.train_file is not None:
        told["train_file"] = settings.train_file
    if job.trunk is not None:
        told["extend_from"] = f"{folder}/{job.trunk}/checkpoint-{job.begins}"
    words = []
    for name, value in told.items():
        words.append(f"--{name}")
        words += [str(each) for each in (value if isinstance(value, tuple) else (value,))]
    return words
