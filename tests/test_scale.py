"""The tables of memory and checkpoints in `docs/scaling.md` are those of the formulas below.

Oracles: a few results worked out by hand; the bytes of a real average and optimizer. Run as a script, this file writes
the tables.
"""

import re
from pathlib import Path

import pytest
import torch

from hf_radam import RAdam, RAdamScheduleFree, WeightAverage

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- scale: (\w+) -->\n)(.*?)(<!-- end of scale -->)", re.DOTALL)

OPTIMIZER, AVERAGE = 8, 4  # bytes per parameter: two float32 numbers of either optimizer; one
# Bytes per parameter of (what every process holds in full, what N processes share), in float32 and with --bf16. DDP
# keeps the gradients a second time, in its buckets. DeepSpeed keeps float32 weights for the optimizer apart from those
# of the forward pass; with --bf16 the latter and the gradients are in bf16.
HELD = {
    "one_process": {False: (4 + 4 + OPTIMIZER + AVERAGE, 0), True: (4 + 4 + OPTIMIZER + AVERAGE, 0)},
    "ddp": {False: (4 + 4 + 4 + OPTIMIZER, AVERAGE), True: (4 + 4 + 4 + OPTIMIZER, AVERAGE)},
    "zero1": {False: (4 + 4, 4 + OPTIMIZER + AVERAGE), True: (2 + 2, 4 + OPTIMIZER + AVERAGE)},
    "zero2": {False: (4, 4 + 4 + OPTIMIZER + AVERAGE), True: (2, 2 + 4 + OPTIMIZER + AVERAGE)},
    "zero3": {False: (0, 4 + 4 + 4 + OPTIMIZER + AVERAGE), True: (0, 2 + 2 + 4 + OPTIMIZER + AVERAGE)},
    "fsdp2": {False: (0, 4 + 4 + OPTIMIZER + AVERAGE), True: (0, 4 + 4 + OPTIMIZER + AVERAGE)},
}
WHEN = {  # what is sharded, and when to take it
    "one_process": ("nothing", "model, state and a batch fit one GPU"),
    "ddp": ("average", "the same, and you have more GPUs"),
    "zero1": ("average, optimizer state", "it nearly fits, and you use DeepSpeed"),
    "zero2": ("average, optimizer state, gradients", "likewise"),
    "zero3": ("everything", "it does not fit, and you use DeepSpeed"),
    "fsdp2": ("everything", "it does not fit one GPU"),
}
WEIGHTS_FILE, FSDP_FILE = 4, 4  # bytes per parameter in a checkpoint: model.safetensors, FSDP's own copy of it

GB = 1e9
# Assumed, in bytes per second: one process that writes, or reads with many threads; the shared file system in total;
# sha256 on one thread.
WRITE, READ, FILE_SYSTEM, SHA256 = 2 * GB, 8 * GB, 50 * GB, 1.8 * GB


def per_rank(file: str, processes: int, bf16: bool = False) -> float:
    """Return the bytes per parameter that a process holds between the backward pass and the step."""
    full, shared = HELD[file][bf16]
    return full + shared / processes


def formula(file: str, bf16: bool) -> str:
    full, shared = HELD[file][bf16]
    return " + ".join([str(full)] * bool(full) + [f"{shared}/N"] * bool(shared))


def checkpoint(full: bool) -> int:
    """Return the bytes per parameter of a checkpoint under FSDP2, with an average."""
    return WEIGHTS_FILE + FSDP_FILE * full + OPTIMIZER + AVERAGE


def save_seconds(size: float, processes: int, full: bool) -> dict[str, float]:
    """Return the bytes of a checkpoint and the seconds that its parts take, for `size` billion parameters."""
    total = size * 1e9 * checkpoint(full)
    writing = WRITE if full else min(processes * WRITE, FILE_SYSTEM)
    return {
        "bytes": total,
        "write": total / writing,
        "hash": total / SHA256 / (1 if full else processes),  # each hashes what it wrote
        # Rank 0 does, a thread for each file: the largest is the state of the optimizer.
        "verify": max(total / READ, size * 1e9 * OPTIMIZER / SHA256 if full else 0),
    }


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(header: str, rows: list[list[str]]) -> str:
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def launch_files() -> str:
    rows = [
        [f"`{file}.yaml`", WHEN[file][0], formula(file, False), formula(file, True), WHEN[file][1]] for file in HELD
    ]
    return table("| launch file | sharded among N processes | bytes | with `--bf16` | take it when |", rows)


def memory() -> str:
    held = {file: f"{number(7 * per_rank(file, 8, bf16=True))} GB" for file in HELD}
    large = {number(70 * per_rank(file, 512, bf16=True)) for file in ("zero3", "fsdp2")}
    assert held["zero3"] == held["fsdp2"] and len(large) == 1
    return (
        f"With `--bf16 true` and `--ewa`, 7 B parameters on 8 GPUs take {held['ddp']} per process with DDP, "
        f"{held['zero1']} with ZeRO-1,\n{held['zero2']} with ZeRO-2, and {held['fsdp2']} with ZeRO-3 or FSDP2. With "
        f"the last two, 70 B on 512 GPUs take {large.pop()} GB.\n"
    )


def saving() -> str:
    full, sharded = (save_seconds(70, 512, full) for full in (True, False))
    return (
        f"For 70 B on 512 GPUs, a checkpoint of FSDP2 has {number(full['bytes'] / GB)} GB with full state dicts and "
        f"{number(sharded['bytes'] / GB)} GB with\nsharded ones. It takes {number(full['write'])} or "
        f"{number(sharded['write'])} s to write, {number(full['hash'])} or {number(sharded['hash'])} s to hash at the "
        f"same time, and {number(full['verify'])} or {number(sharded['verify'])} s to verify.\nAssumed: "
        f"{WRITE / GB:g} GB/s for each process that writes, {READ / GB:g} GB/s for one that reads, "
        f"{FILE_SYSTEM / GB:g} GB/s for the file system,\n{SHA256 / GB:g} GB/s for sha256.\n"
    )


TABLES = {"launch_files": launch_files, "memory": memory, "saving": saving}


def test_the_tables_are_those_of_the_formulas():
    found = {name: text for _, name, text, _ in MARKED.findall(DOCUMENT.read_text(encoding="utf-8"))}
    assert found == {name: make() for name, make in TABLES.items()}, "run python tests/test_scale.py"


def test_every_launch_file_has_its_row():
    files = {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    assert HELD.keys() == WHEN.keys() == files - {"two_machines"}  # which is DDP


def test_some_sums_by_hand():
    assert per_rank("fsdp2", 8) * 7 == 17.5  # 7 B x 20 bytes / 8
    assert per_rank("ddp", 8) * 7 == 143.5  # 7 B x (20 + 4/8)
    assert per_rank("fsdp2", 512) * 70 == pytest.approx(2.734, abs=1e-3)
    assert save_seconds(7, 8, full=True)["bytes"] == 140e9
    assert save_seconds(7, 8, full=True)["write"] == 70  # 140 GB at 2 GB/s by one process
    assert save_seconds(70, 512, full=False)["bytes"] == 1120e9
    assert save_seconds(70, 512, full=False)["write"] == 22.4  # at the file system's 50 GB/s
    assert save_seconds(70, 512, full=False)["verify"] == 140  # 1120 GB at 8 GB/s
    assert save_seconds(70, 512, full=True)["verify"] == pytest.approx(560 / 1.8)


@pytest.mark.parametrize("kind", [RAdam, RAdamScheduleFree])
def test_optimizers_and_average_take_what_is_said(kind):
    model = torch.nn.Linear(100, 100, bias=False)
    optimizer = kind(model.parameters(), lr=0.1)
    if kind is RAdamScheduleFree:
        optimizer.train()
    model(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    state = [v for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    assert sum(v.nbytes for v in state) == OPTIMIZER * model.weight.numel()
    average = WeightAverage(model.named_parameters())
    average.update(1)
    assert sum(v.nbytes for v in average.state_dict()["averages"].values()) == AVERAGE * model.weight.numel()


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    text = MARKED.sub(lambda match: match.group(1) + TABLES[match.group(2)]() + match.group(4), text)
    DOCUMENT.write_text(text, encoding="utf-8")
