"""Time optimizer steps and averages, and their memory: hf_radam's, torch's and those of the installed packages.

The rows of a table run in turns, round after round in other orders, beside a plain `lerp_`, which gives the bandwidth
of the memory in the same round. The memory of a row (on CPUs: resident, Linux only) is measured in its own process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import schedulefree
import torch
from torch import nn
from torch.optim import swa_utils
from transformers import LlamaConfig, LlamaForCausalLM

from hf_radam import RAdam, RAdamScheduleFree, WeightAverage

PEERS = ("torch-optimi", "pytorch_optimizer", "heavyball", "timm", "diffusers", "ema-pytorch")
STEP = 7 * 4
"""Bytes per parameter of a step: it reads p, g and two states, and writes p and the states."""
AVERAGING = 3 * 4
"""Bytes per parameter of an averaging, and of `lerp_`: two tensors are read and one is written."""
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
DECAY = 0.999
WARM_UP = 8
"""Runs before the first that counts: they compile, make the states, and pass RAdam's first phase."""
CLEAR_REFS = Path("/proc/self/clear_refs")

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        make: takes the parameters, which have gradients, and returns what is timed.
        traffic: bytes per parameter that it must at least move.
        grows: whether it is also measured at the other model sizes.
        takes_gradients: whether it leaves the parameters without gradients, so that they must be put back.
    """

    name: str
    make: Callable[[nn.ParameterList], Callable[[], Any]]
    traffic: float = STEP
    grows: bool = False
    takes_gradients: bool = False
    dtype: torch.dtype = torch.float32


def version(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def llama(width: int) -> LlamaForCausalLM:
    """Make a llama of 8 layers; a width of 256 has 8, 576 has 37 and 960 has 96 million parameters."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 64 * 64, "num_hidden_layers": 8, **heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, tie_word_embeddings=True, **shape))


def shapes_of(width: int) -> Shapes:
    """Shapes of the parameters of that llama."""
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in llama(width).parameters()]


def size_of(shapes: Shapes) -> int:
    """Count the elements of tensors of these shapes."""
    return sum(map(math.prod, shapes))


# ---- The rows ----


def steps(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., Callable[[], Any]]:
    """Time the steps of an optimizer."""

    def make(model: nn.ParameterList) -> Callable[[], Any]:
        made = optimizer([*model])
        if hasattr(made, "train"):  # the schedule-free ones
            made.train()
        return made.step

    return make


def step_rows() -> list[Row]:
    """Steps of hf_radam's optimizers, of those they replace, and of other packages'."""
    radam = {"decoupled_weight_decay": True, "foreach": True, **OPTIONS}
    free, stock_free = RAdamScheduleFree, schedulefree.RAdamScheduleFree
    rows = [
        Row("hf_radam.RAdamScheduleFree, fused", steps(lambda p: free(p, fused=True, **OPTIONS)), grows=True),
        Row("hf_radam.RAdamScheduleFree", steps(lambda p: free(p, fused=False, **OPTIONS))),
        Row("schedulefree.RAdamScheduleFree, foreach", steps(lambda p: stock_free(p, **OPTIONS)), grows=True),
        Row("hf_radam.RAdam, fused", steps(lambda p: RAdam(p, fused=True, **OPTIONS)), grows=True),
        Row("hf_radam.RAdam", steps(lambda p: RAdam(p, foreach=True, fused=False, **OPTIONS))),
        Row("hf_radam.RAdam, fused, then WeightAverage", step_and_average, STEP + AVERAGING),
        Row("torch.optim.RAdam, foreach", steps(lambda p: torch.optim.RAdam(p, **radam)), grows=True),
        Row("torch.optim.AdamW, fused", steps(lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS)), grows=True),
        Row("torch.optim.AdamW, foreach", steps(lambda p: torch.optim.AdamW(p, foreach=True, **OPTIONS))),
    ]
    if version("torch-optimi"):
        import optimi

        rows.append(Row("optimi.RAdam, foreach", steps(lambda p: optimi.RAdam(p, foreach=True, **OPTIONS))))
    if version("pytorch_optimizer"):
        import pytorch_optimizer as peer

        rows.append(Row("pytorch_optimizer.RAdam", steps(lambda p: peer.RAdam(p, **OPTIONS))))
        schedule_free = steps(lambda p: peer.ScheduleFreeRAdam(p, **OPTIONS))
        rows.append(Row("pytorch_optimizer.ScheduleFreeRAdam", schedule_free))
    if version("heavyball"):  # it has no RAdam
        import heavyball

        rows.append(Row("heavyball.AdamW", steps(lambda p: heavyball.AdamW(p, **OPTIONS)), takes_gradients=True))
        rows.append(Row("heavyball.SFAdamW", steps(lambda p: heavyball.SFAdamW(p, **OPTIONS)), takes_gradients=True))
    return rows


def step_and_average(model: nn.ParameterList) -> Callable[[], Any]:
    """Time a step of RAdam and an averaging."""
    step, average = RAdam([*model], fused=True, **OPTIONS).step, our_average(model)
    return lambda: (step(), average())


def our_average(model: nn.ParameterList, *, every: int = 1) -> Callable[[], Any]:
    """Time `WeightAverage`."""
    average, numbers = WeightAverage(model.named_parameters(), decay=DECAY, every=every), count(1)
    return lambda: average.update(next(numbers))


def torch_average(**functions: Any) -> Callable[..., Callable[[], Any]]:
    """Time `AveragedModel` with one of its functions."""

    def make(model: nn.ParameterList) -> Callable[[], Any]:
        return partial(swa_utils.AveragedModel(model, **functions).update_parameters, model)

    return make


def timm_average(model: nn.ParameterList) -> Callable[[], Any]:
    """Time timm's average, from its file: `import timm` needs a torchvision that fits the build of torch."""
    from importlib.util import module_from_spec, spec_from_file_location

    file = importlib.metadata.distribution("timm").locate_file("timm/utils/model_ema.py")
    spec = spec_from_file_location("timm_model_ema", str(file))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return partial(module.ModelEmaV3(model, decay=DECAY).update, model)


def diffusers_average(model: nn.ParameterList) -> Callable[[], Any]:
    """Time diffusers' average."""
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=DECAY, foreach=True)
    return lambda: average.step(model.parameters())


def ema_pytorch_average(model: nn.ParameterList) -> Callable[[], Any]:
    """Time ema-pytorch's average."""
    from ema_pytorch import EMA

    return EMA(model, beta=DECAY, update_after_step=0, update_every=1, use_foreach=True).update


def average_rows() -> list[Row]:
    """Averages of float32 parameters, and hf_radam's of bf16 ones."""
    one_by_one, at_once = swa_utils.get_ema_avg_fn(DECAY), swa_utils.get_ema_multi_avg_fn(DECAY)
    peers = {
        "timm": ("timm ModelEmaV3", timm_average),
        "diffusers": ("diffusers EMAModel, foreach", diffusers_average),
        "ema-pytorch": ("ema-pytorch, foreach", ema_pytorch_average),
    }
    return [
        Row("hf_radam.WeightAverage", our_average, AVERAGING, grows=True),
        Row("torch AveragedModel, multi_avg_fn", torch_average(multi_avg_fn=at_once), AVERAGING, grows=True),
        Row("torch AveragedModel, avg_fn", torch_average(avg_fn=one_by_one), AVERAGING, grows=True),
        *(Row(*named, AVERAGING) for package, named in peers.items() if version(package)),
        Row("hf_radam.WeightAverage of bf16", our_average, AVERAGING - 2, dtype=torch.bfloat16),
    ]


ROWS: dict[str, Callable[[], list[Row]]] = {"steps": step_rows, "averaging": average_rows}


def limit_of(shapes: Shapes, device: torch.device) -> Row:
    """`lerp_` of one long tensor with as many elements as the parameters have."""
    one, other = torch.randn(2, size_of(shapes), device=device)
    return Row("limit: lerp_ of one tensor", lambda _: lambda: one.lerp_(other, 0.1), AVERAGING, grows=True)


# ---- Time ----


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Running:
    """A row that runs, on parameters of its own."""

    def __init__(self, row: Row, shapes: Shapes, device: torch.device):
        torch.manual_seed(0)
        self.row, self.device = row, device
        self.seconds: list[float] = []
        self._model = nn.ParameterList(nn.Parameter(torch.randn(s, device=device).to(row.dtype)) for s in shapes)
        for parameter in self._model:
            parameter.grad = torch.randn_like(parameter) * 0.01
        self._gradients = [parameter.grad for parameter in self._model]
        self._run: Callable[[], Any] | None = None

    def once(self) -> float:
        """Run once and return the seconds; put gradients back before; the first run also makes the row."""
        if self.row.takes_gradients:
            for parameter, gradient in zip(self._model, self._gradients, strict=True):
                parameter.grad = gradient
        self._run = self._run or self.row.make(self._model)
        synchronize(self.device)
        begin = time.perf_counter()
        self._run()
        synchronize(self.device)
        return time.perf_counter() - begin


def time_table(what: str, shapes: Shapes, device: torch.device, *, rounds: int, growing: bool) -> dict[str, Any]:
    """Time the rows of `steps` or `averaging` at one model size; `growing` ones only, or all.

    Returns:
        For JSON: the size, and of each row the seconds of each round, their median, and the median of their ratios to
        the time of the row's bytes at the bandwidth of `lerp_` in the same round: machines change their pace.
    """
    rows = [limit_of(shapes, device), *(row for row in ROWS[what]() if row.grows or not growing)]
    running = [Running(row, shapes, device) for row in rows]
    for one in running:
        for _ in range(WARM_UP):
            one.once()
    orders = random.Random(0)  # a row leaves its threads and caches to the next: not always to the same
    for _ in range(rounds):
        for one in orders.sample(running, len(running)):
            one.seconds.append(one.once())
    limit = [seconds / AVERAGING for seconds in running[0].seconds]
    return {
        "what": what,
        "parameters": size_of(shapes),
        "tensors": len(shapes),
        "rows": [
            {
                "name": one.row.name,
                "bytes_per_parameter": one.row.traffic,
                "seconds": statistics.median(one.seconds),
                "to_limit": statistics.median(a / b for a, b in zip(one.seconds, limit, strict=True)) / one.row.traffic,
                "rounds": one.seconds,
            }
            for one in running
        ],
    }


def time_intervals(shapes: Shapes, device: torch.device, *, every: list[int], rounds: int) -> dict[str, Any]:
    """Time `WeightAverage(every=...)` per step, over whole periods of all intervals."""
    period = math.lcm(*every)
    running = [Running(Row(f"every {n}", partial(our_average, every=n)), shapes, device) for n in every]
    for number in range(rounds + 1):
        for one in running:
            seconds = sum(one.once() for _ in range(period)) / period
            if number > 0:  # the first round copies the weights
                one.seconds.append(seconds)
    return {
        "parameters": size_of(shapes),
        "steps_per_round": period,
        "rows": [
            {"every": n, "seconds": statistics.median(one.seconds), "rounds": one.seconds}
            for n, one in zip(every, running, strict=True)
        ],
    }


# ---- Memory ----


def memory_table(what: str, width: int, device: torch.device) -> dict[str, Any]:
    """Measure the bytes per parameter of every row, held between steps and at the peak, besides p and g."""
    rows = []
    for row in ROWS[what]():
        command = [sys.executable, __file__, what, row.name, str(width), str(device)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The memory of {row.name} could not be measured:\n{done.stderr[-3000:]}")
        rows.append({"name": row.name} | json.loads(done.stdout.splitlines()[-1]))
    return {"what": what, "parameters": size_of(shapes_of(width)), "rows": rows}


def row_memory(what: str, name: str, width: int, device: torch.device) -> dict[str, float]:
    """Measure one row in this process; it runs twice, so that what compiling takes is there before."""
    if device.type == "cpu":
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed memory goes back at once
    (row,) = [row for row in ROWS[what]() if row.name == name]
    shapes = shapes_of(width)
    for _ in range(2):
        running = Running(row, shapes, device)
        before = _held(device)
        for _ in range(WARM_UP):
            running.once()
        after = _held(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            CLEAR_REFS.write_text("5")  # sets the high-water mark back
        running.once()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
        del running
    return {"held": (after - before) / size_of(shapes), "peak": (peak - before) / size_of(shapes)}


def _held(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def has_memory(device: torch.device) -> bool:
    """Whether memory can be measured here."""
    return device.type == "cuda" or os.access(CLEAR_REFS, os.W_OK)


if __name__ == "__main__":
    print(json.dumps(row_memory(sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.device(sys.argv[4]))))
