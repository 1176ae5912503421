"""What is timed: updates of optimizers and averagings, ours, torch's and those of the packages that are installed."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import schedulefree
import torch
from torch import nn
from torch.optim import swa_utils

from hf_radam import RAdam, RAdamScheduleFree, WeightAverage

MILLION = 10**6
PEERS = ("torch-optimi", "pytorch_optimizer", "heavyball", "timm", "diffusers", "ema-pytorch")
UPDATE = 7 * 4
"""Bytes per parameter of an update: it reads p, g and two states, and writes p and the states."""
AVERAGING = 3 * 4
"""Bytes per parameter of an averaging, and of `lerp_`: one tensor is read, another is read and written."""
OPTIONS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
DECAY = 0.999


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: what it is called.
        make: takes the parameters, which have gradients, and returns what is timed.
        traffic: bytes per parameter that it must at least move.
        grows: whether it is also measured at the other model sizes.
        takes_gradients: whether it leaves the parameters without gradients, so that they must be put back.
        dtype: of the parameters.
    """

    name: str
    make: Callable[[nn.ParameterList], Callable[[], Any]]
    traffic: float = UPDATE
    grows: bool = False
    takes_gradients: bool = False
    dtype: torch.dtype = torch.float32


# ---- The parameters ----


def width_of(millions: float) -> int:
    """Width of the llama that is nearest to so many million parameters: a multiple of 64."""
    width = 64
    while size_of(llama(width)) + size_of(llama(width + 64)) < 2 * millions * MILLION:
        width += 64
    return width


def size_of(sizes: Iterable[tuple[int, ...]]) -> int:
    """Elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in sizes)


def hidden_of(width: int) -> int:
    """Width of its feed-forward layers: 8/3 of its own, a multiple of 64."""
    return width * 8 // 3 // 64 * 64


def llama(width: int) -> Iterator[tuple[int, ...]]:
    """Shapes: embedding, 8 layers of attention, gated feed-forward and norms, and the last norm."""
    yield 8192, width
    hidden = hidden_of(width)
    for _ in range(8):
        yield from [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    yield (width,)


def shapes(millions: float) -> list[tuple[int, ...]]:
    """Shapes of that llama."""
    return [*llama(width_of(millions))]


def model_of(
    sizes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.ParameterList:
    """Parameters of these shapes with gradients."""
    torch.manual_seed(0)
    made = nn.ParameterList(nn.Parameter(torch.randn(size, device=device).to(dtype)) for size in sizes)
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return made


def limit_of(sizes: list[tuple[int, ...]], device: torch.device) -> Row:
    """`lerp_` of one long tensor towards another, of as many elements as the parameters have."""
    number = size_of(sizes)

    def make(_: nn.ParameterList) -> Callable[[], Any]:
        one, other = torch.randn(number, device=device), torch.randn(number, device=device)
        return lambda: one.lerp_(other, 0.1)

    return Row("limit: lerp_ of one tensor", make, AVERAGING, grows=True)


# ---- Updates ----


def updates(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[..., Callable[[], Any]]:
    """What times the steps of an optimizer. Some write into the gradients, as `schedulefree` does; ours do not."""

    def make(model: nn.ParameterList) -> Callable[[], Any]:
        made = optimizer([*model])
        if hasattr(made, "train"):  # the schedule-free ones
            made.train()
        return made.step

    return make


def update_rows() -> list[Row]:
    """Updates: ours, those they stand beside, and those of other packages."""
    torch_radam = {"decoupled_weight_decay": True, "foreach": True, **OPTIONS}
    rows = [
        Row(
            "hf_radam.RAdamScheduleFree, fused",
            updates(lambda p: RAdamScheduleFree(p, fused=True, **OPTIONS)),
            grows=True,
        ),
        Row("hf_radam.RAdamScheduleFree", updates(lambda p: RAdamScheduleFree(p, **OPTIONS))),
        Row(
            "schedulefree.RAdamScheduleFree, foreach",
            updates(lambda p: schedulefree.RAdamScheduleFree(p, **OPTIONS)),
            grows=True,
        ),
        Row("hf_radam.RAdam, fused", updates(lambda p: RAdam(p, fused=True, **OPTIONS)), grows=True),
        Row("hf_radam.RAdam", updates(lambda p: RAdam(p, foreach=True, **OPTIONS))),
        Row("hf_radam.RAdam, fused, then WeightAverage", update_and_average, UPDATE + AVERAGING),
        Row("hf_radam.RAdam, fused, WeightAverage in its pass", partial(update_and_average, folded=True), UPDATE + 8),
        Row("torch.optim.RAdam, foreach", updates(lambda p: torch.optim.RAdam(p, **torch_radam)), grows=True),
        Row("torch.optim.AdamW, fused", updates(lambda p: torch.optim.AdamW(p, fused=True, **OPTIONS)), grows=True),
        Row("torch.optim.AdamW, foreach", updates(lambda p: torch.optim.AdamW(p, foreach=True, **OPTIONS))),
    ]
    if installed("torch-optimi"):
        import optimi

        rows.append(Row("optimi.RAdam, foreach", updates(lambda p: optimi.RAdam(p, foreach=True, **OPTIONS))))
    if installed("pytorch_optimizer"):
        import pytorch_optimizer as several

        rows.append(Row("pytorch_optimizer.RAdam", updates(lambda p: several.RAdam(p, **OPTIONS))))
        free = updates(lambda p: several.ScheduleFreeRAdam(p, **OPTIONS))
        rows.append(Row("pytorch_optimizer.ScheduleFreeRAdam", free))
    if installed("heavyball"):  # it has no RAdam
        import heavyball

        rows.append(Row("heavyball.AdamW", updates(lambda p: heavyball.AdamW(p, **OPTIONS)), takes_gradients=True))
        rows.append(Row("heavyball.SFAdamW", updates(lambda p: heavyball.SFAdamW(p, **OPTIONS)), takes_gradients=True))
    return rows


def update_and_average(model: nn.ParameterList, *, folded: bool = False) -> Callable[[], Any]:
    """Update with RAdam and average, in two passes or in one."""
    optimizer, steps = RAdam([*model], fused=True, **OPTIONS), count(1)
    average = WeightAverage(model.named_parameters(), decay=DECAY)

    def run() -> None:
        step = next(steps)
        if folded:
            average.fold_into(optimizer, step)
        optimizer.step()
        average.update(step)

    return run


# ---- Averaging ----


def our_average(model: nn.ParameterList, *, every: int = 1) -> Callable[[], Any]:
    """Call `update` with the number of the next update."""
    average, steps = WeightAverage(model.named_parameters(), decay=DECAY, every=every), count(1)
    return lambda: average.update(next(steps))


def torch_average(**functions: Any) -> Callable[..., Callable[[], Any]]:
    """What times `AveragedModel` with one of its functions."""

    def make(model: nn.ParameterList) -> Callable[[], Any]:
        average = swa_utils.AveragedModel(model, **functions)
        return lambda: average.update_parameters(model)

    return make


def average_rows() -> list[Row]:
    """Averaging of float32 parameters, and ours of bf16 ones."""
    one_by_one, at_once = swa_utils.get_ema_avg_fn(DECAY), swa_utils.get_ema_multi_avg_fn(DECAY)
    rows = [
        Row("hf_radam.WeightAverage", our_average, AVERAGING, grows=True),
        Row("torch AveragedModel, multi_avg_fn", torch_average(multi_avg_fn=at_once), AVERAGING, grows=True),
        Row("torch AveragedModel, avg_fn", torch_average(avg_fn=one_by_one), AVERAGING, grows=True),
    ]
    if installed("timm"):
        rows.append(Row("timm ModelEmaV3", timm_average, AVERAGING))
    if installed("diffusers"):
        rows.append(Row("diffusers EMAModel, foreach", diffusers_average, AVERAGING))
    if installed("ema-pytorch"):
        rows.append(Row("ema-pytorch, foreach", ema_pytorch_average, AVERAGING))
    rows.append(Row("hf_radam.WeightAverage of bf16", our_average, AVERAGING - 2, dtype=torch.bfloat16))
    return rows


def timm_average(model: nn.ParameterList) -> Callable[[], Any]:
    """What times timm's average, from its own file: `import timm` needs a torchvision that fits the build of torch."""
    from importlib.util import module_from_spec, spec_from_file_location

    file = importlib.metadata.distribution("timm").locate_file("timm/utils/model_ema.py")
    spec = spec_from_file_location("timm_model_ema", str(file))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    average = module.ModelEmaV3(model, decay=DECAY)
    return lambda: average.update(model)


def diffusers_average(model: nn.ParameterList) -> Callable[[], Any]:
    """What times diffusers' average."""
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=DECAY, foreach=True)
    return lambda: average.step(model.parameters())


def ema_pytorch_average(model: nn.ParameterList) -> Callable[[], Any]:
    """What times ema-pytorch's average."""
    from ema_pytorch import EMA

    return EMA(model, beta=DECAY, update_after_step=0, update_every=1, use_foreach=True).update


ROWS: dict[str, Callable[[], list[Row]]] = {"updates": update_rows, "averaging": average_rows}


# ---- The packages ----


def installed(package: str) -> bool:
    """Whether a package is there."""
    return version(package) is not None


def version(package: str) -> str | None:
    """Version of a package that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
