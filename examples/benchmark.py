"""What an update and an average cost, side by side: ours, torch's and other packages', against the memory's bandwidth.

    python examples/benchmark.py --parameters 34 --json benchmark.json

All of one table run in turns in one process, round after round; a number is the median of its rounds. The limit is what
the same bytes take in one pass, at the bandwidth of a plain `lerp_` (three streams) measured in the same rounds.
Packages that are not installed are left out (`pip install torch-optimi pytorch_optimizer diffusers
ema-pytorch`); heavyball takes the gradients away, so that there is no second update to time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schedulefree
import torch
from torch import nn

from hf_radam import RAdam, RAdamScheduleFree, WeightAverage

MILLION = 10**6


@dataclass
class Row:
    """One thing that is timed.

    Attributes:
        name: what it is called in the table.
        streams: tensors that it must at least read or write once, each of the size of the parameters.
        run: does it once.
        seconds: of each round.
    """

    name: str
    streams: int
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)


def shapes(millions: float) -> list[tuple[int, ...]]:
    """Shapes of a llama with about so many million parameters, its largest dimension a multiple of 64."""
    width = 64
    while parameters_of(width + 64) <= millions * MILLION:
        width += 64
    return [*llama(width)]


def parameters_of(width: int) -> int:
    """Parameters of `llama(width)`."""
    return sum(torch.Size(shape).numel() for shape in llama(width))


def llama(width: int) -> Iterator[tuple[int, ...]]:
    """Embedding, 8 layers of attention, gated feed-forward and norms, and the last norm."""
    yield 8192, width
    hidden = width * 8 // 3 // 64 * 64 or 64
    for _ in range(8):
        yield from [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    yield (width,)


def model_of(
    sizes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.ParameterList:
    """Parameters of these shapes with gradients."""
    torch.manual_seed(0)
    made = nn.ParameterList(nn.Parameter(torch.randn(size, device=device).to(dtype)) for size in sizes)
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return made


def installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- What is timed ----


def optimizer_rows(sizes: list[tuple[int, ...]], device: torch.device) -> list[Row]:
    """Updates of optimizers. All read p, g and two states and write p and the states: seven streams.

    The gradients stay the same, except where an optimizer writes into them, as `schedulefree` does.
    """
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "hf_radam.RAdamScheduleFree, fused": lambda p: RAdamScheduleFree(p, fused=True, **options),
        "hf_radam.RAdamScheduleFree": lambda p: RAdamScheduleFree(p, **options),
        "schedulefree.RAdamScheduleFree, foreach": lambda p: schedulefree.RAdamScheduleFree(p, **options),
        "hf_radam.RAdam, fused": lambda p: RAdam(p, fused=True, **options),
        "hf_radam.RAdam": lambda p: RAdam(p, foreach=True, **options),
        "torch.optim.RAdam, foreach": lambda p: torch.optim.RAdam(
            p, foreach=True, decoupled_weight_decay=True, **options
        ),
        "torch.optim.AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True, **options),
        "torch.optim.AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True, **options),
    }
    if installed("torch-optimi"):
        import optimi

        makers["torch-optimi RAdam, foreach"] = lambda p: optimi.RAdam(p, foreach=True, **options)
    if installed("pytorch_optimizer"):
        import pytorch_optimizer

        makers["pytorch_optimizer.RAdam"] = lambda p: pytorch_optimizer.RAdam(p, weight_decouple=True, **options)
    rows = []
    for name, make in makers.items():
        model = model_of(sizes, device)
        optimizer = make([*model])
        if hasattr(optimizer, "train"):
            optimizer.train()
        rows.append(Row(name, 7, optimizer.step))
    return rows


def average_rows(sizes: list[tuple[int, ...]], device: torch.device) -> list[Row]:
    """Averaging float32 parameters: the average is read and written, the parameters are read: three streams."""
    rows = []
    model = model_of(sizes, device)
    ours, step = WeightAverage(model.named_parameters(), decay=0.999), iter(range(1, 10**9))
    rows.append(Row("hf_radam.WeightAverage", 3, lambda: ours.update(next(step))))
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    rows.append(Row("torch AveragedModel, multi_avg_fn", 3, lambda: theirs.update_parameters(model)))
    plain = torch.optim.swa_utils.AveragedModel(model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.999))
    rows.append(Row("torch AveragedModel, avg_fn", 3, lambda: plain.update_parameters(model)))
    if installed("diffusers"):
        from diffusers.training_utils import EMAModel

        of_diffusers = EMAModel(model.parameters(), decay=0.999, foreach=True)
        rows.append(Row("diffusers EMAModel, foreach", 3, lambda: of_diffusers.step(model.parameters())))
    if installed("ema-pytorch"):
        from ema_pytorch import EMA

        of_ema = EMA(model, beta=0.999, update_after_step=0, update_every=1)
        rows.append(Row("ema-pytorch", 3, of_ema.update))
    low = model_of(sizes, device, torch.bfloat16)
    narrow, count = WeightAverage(low.named_parameters(), decay=0.999), iter(range(1, 10**9))
    rows.append(Row("hf_radam.WeightAverage of bf16", 3, lambda: narrow.update(next(count))))
    return rows


# ---- Timing ----


def measure(rows: list[Row], *, rounds: int, device: torch.device) -> None:
    """Time every row once in each round, after some updates that compile, warm up and pass RAdam's first phase."""
    for row in rows:
        for _ in range(8):
            row.run()
    for _ in range(rounds):
        for row in rows:
            synchronize(device)
            begin = time.perf_counter()
            row.run()
            synchronize(device)
            row.seconds.append(time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(title: str, rows: list[Row], limit: Row, *, bytes_of_a_stream: int) -> tuple[str, list[dict[str, Any]]]:
    """Markdown, and the same as data: medians, and their ratios to the time of one pass at the limit's bandwidth."""
    bandwidth = limit.streams * bytes_of_a_stream / statistics.median(limit.seconds)
    lines = [f"| {title} | ms | to the limit |", "|---|---|---|"]
    data = []
    for row in [limit, *rows]:
        seconds = statistics.median(row.seconds)
        ratio = seconds * bandwidth / (row.streams * bytes_of_a_stream)
        lines.append(f"| {row.name} | {1e3 * seconds:.1f} | {ratio:.2f} |")
        data.append({"name": row.name, "seconds": seconds, "to_limit": ratio, "rounds": row.seconds})
    return "\n".join(lines), data


def limit_row(sizes: list[tuple[int, ...]], device: torch.device) -> Row:
    """`lerp_` of one long tensor towards another: three streams, of as many bytes as the parameters have."""
    count = sum(torch.Size(size).numel() for size in sizes)
    one, other = torch.randn(count, device=device), torch.randn(count, device=device)
    return Row("limit: lerp_ of one tensor", 3, lambda: one.lerp_(other, 0.1))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", default=[34.0], metavar="MILLIONS", help="model sizes")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    return parser.parse_args(words)


def main() -> int:
    """Measure and print."""
    arguments = parse_arguments()
    device, everything = torch.device(arguments.device), []
    for millions in arguments.parameters:
        sizes = shapes(millions)
        count = sum(torch.Size(size).numel() for size in sizes)
        print(
            f"\n{count / MILLION:.1f} million parameters in {len(sizes)} tensors, {device}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, medians of {arguments.rounds} rounds\n"
        )
        for title, make in (("update", optimizer_rows), ("averaging", average_rows)):
            limit, rows = limit_row(sizes, device), make(sizes, device)
            measure([limit, *rows], rounds=arguments.rounds, device=device)
            text, data = table(title, rows, limit, bytes_of_a_stream=4 * count)
            print(text + "\n", flush=True)
            everything.append({"what": title, "parameters": count, "rows": data})
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
