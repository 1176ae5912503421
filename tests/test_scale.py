"""The sums about memory and saving in the README and in `docs/scale.md` are those of the formulas below.

Oracles: a few results worked out by hand; the bytes of a real average and optimizer. Run as a script, this file writes
its tables into both documents.
"""

import re
from pathlib import Path

import pytest
import torch

from hf_radam import RAdam, RAdamScheduleFree, WeightAverage

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "scale.md")
MARKED = re.compile(r"(<!-- scale: (\w+).*?-->\n)(.*?)(<!-- end of scale -->)", re.DOTALL)

OPTIMIZER, AVERAGE = 8, 4  # bytes per parameter: two float32 numbers, RAdam's or the schedule-free optimizer's; one
# Bytes per parameter of (what every process holds whole, what N processes share), float32 and with --bf16. DDP keeps
# the gradients twice, the second time in its buckets. DeepSpeed keeps float32 weights for the optimizer apart from
# those of the forward pass; with --bf16 the latter and the gradients are in bf16.
HELD = {
    "one_process": {False: (4 + 4 + OPTIMIZER + AVERAGE, 0), True: (4 + 4 + OPTIMIZER + AVERAGE, 0)},
    "ddp": {False: (4 + 4 + 4 + OPTIMIZER, AVERAGE), True: (4 + 4 + 4 + OPTIMIZER, AVERAGE)},
    "zero1": {False: (4 + 4, 4 + OPTIMIZER + AVERAGE), True: (2 + 2, 4 + OPTIMIZER + AVERAGE)},
    "zero2": {False: (4, 4 + 4 + OPTIMIZER + AVERAGE), True: (2, 2 + 4 + OPTIMIZER + AVERAGE)},
    "zero3": {False: (0, 4 + 4 + 4 + OPTIMIZER + AVERAGE), True: (0, 2 + 2 + 4 + OPTIMIZER + AVERAGE)},
    "fsdp2": {False: (0, 4 + 4 + OPTIMIZER + AVERAGE), True: (0, 4 + 4 + OPTIMIZER + AVERAGE)},
}
SHARDED = {
    "one_process": "nothing",
    "ddp": "average",
    "zero1": "average, optimizer state",
    "zero2": "average, optimizer state, gradients",
    "zero3": "everything",
    "fsdp2": "everything",
}
CHOOSE = {
    "one_process": "model, state and a batch fit one GPU",
    "ddp": "the same, and you have more GPUs",
    "zero1": "it nearly fits, and DeepSpeed is what you know",
    "zero2": "likewise",
    "zero3": "it does not fit, and DeepSpeed is what you know",
    "fsdp2": "it does not fit one GPU",
}
WEIGHTS_FILE, FSDP_FILE = 4, 4  # bytes per parameter in a checkpoint: model.safetensors, FSDP's own copy of it

GB = 1e9
# Assumed, in bytes per second: one process writing to a disk or to a shared file system; that file system altogether;
# what a GPU receives from others, inside a machine (NVLink) and between machines (400 Gbit/s); sha256 on one thread.
WRITE, FILE_SYSTEM, NVLINK, NETWORK, SHA256 = 2 * GB, 50 * GB, 200 * GB, 50 * GB, 1.8 * GB
GPUS_PER_MACHINE = 8


def per_rank(file: str, processes: int, bf16: bool = False) -> float:
    """Bytes per parameter that a process holds between the backward pass and the update."""
    whole, shared = HELD[file][bf16]
    return whole + shared / processes


def formula(file: str, bf16: bool) -> str:
    """The same as text."""
    whole, shared = HELD[file][bf16]
    return " + ".join([str(whole)] * bool(whole) + [f"{shared}/N"] * bool(shared))


def checkpoint(full: bool) -> int:
    """Bytes per parameter of a checkpoint under FSDP2, with an average."""
    return WEIGHTS_FILE + FSDP_FILE * full + OPTIMIZER + AVERAGE


def table(header: str, rows: list[list[str]]) -> str:
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def launch_files() -> str:
    """Which launch file when, and what a process holds."""
    rows = []
    for file in HELD:
        numbers = [formula(file, bf16) for bf16 in (False, True)]
        rows.append([f"`{file}.yaml`", SHARDED[file], *numbers, CHOOSE[file]])
    return table("| launch file | sharded among N processes | bytes | with `--bf16` | take it when |", rows)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def sums_of_memory() -> str:
    """What a process holds for two models."""
    rows = []
    for size, processes in ((7, 8), (70, 512)):
        for file in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
            whole, shared = HELD[file][True]
            held = per_rank(file, processes, bf16=True)
            arithmetic = f"{size} x ({formula(file, True)})".replace("N", str(processes))
            rows.append([f"{size} B on {processes}", f"`{file}.yaml`", arithmetic, f"{number(size * held)} GB"])
    return table("| model, GPUs | launch file | 10^9 x bytes | held by each |", rows)


def save_seconds(size: float, processes: int, full: bool) -> dict[str, float]:
    """Seconds of a checkpoint's parts, in the order of the table."""
    total = size * 1e9 * checkpoint(full)
    machines = max(1, processes // GPUS_PER_MACHINE)
    # Gathering brings all that is written to every GPU; between machines at the speed of the network.
    gathered = size * 1e9 * (WEIGHTS_FILE + OPTIMIZER + AVERAGE) if full else 0
    writing = WRITE if full else min(processes * WRITE, machines * GPUS_PER_MACHINE * WRITE, FILE_SYSTEM)
    return {
        "bytes": total,
        "gather": gathered / (NVLINK if machines == 1 else NETWORK),
        "write": total / writing,
        "checksum": total / SHA256 / (1 if full else processes),  # each sums what it wrote
        # Each file by one process: the largest, the whole state of the optimizer, is read and summed alone.
        "verify": size * 1e9 * OPTIMIZER / SHA256 if full else max(total / writing, total / SHA256 / processes),
    }


def sums_of_saving() -> str:
    """What a checkpoint costs for two models."""
    rows = []
    for size, processes in ((7, 8), (70, 512)):
        for full in (True, False):
            cost = save_seconds(size, processes, full)
            rows.append(
                [
                    f"{size} B on {processes}",
                    "FULL" if full else "SHARDED",
                    f"{size} x {checkpoint(full)} = {number(cost['bytes'] / GB)} GB",
                    *(number(cost[name]) if cost[name] else "0" for name in ("gather", "write", "checksum", "verify")),
                ]
            )
    header = "| model, GPUs | state dict | a checkpoint | s to gather | s to write | s of sha256 | s to verify |"
    return table(header, rows)


TABLES = {"launch_files": launch_files, "memory": sums_of_memory, "saving": sums_of_saving}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_formulas(path):
    found = MARKED.findall(path.read_text(encoding="utf-8"))
    assert found
    for _, name, text, _ in found:
        assert text == TABLES[name](), "write it anew: python tests/test_scale.py"


def test_every_launch_file_has_its_row():
    files = {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    assert HELD.keys() == files - {"two_machines"}  # which is DDP


def test_some_sums_by_hand():
    assert per_rank("fsdp2", 8) * 7 == 17.5  # 7 B x 20 bytes / 8
    assert per_rank("ddp", 8) * 7 == 143.5  # 7 B x (20 + 4/8)
    assert per_rank("fsdp2", 512) * 70 == pytest.approx(2.734, abs=1e-3)
    assert save_seconds(7, 8, full=True)["bytes"] == 140e9
    assert save_seconds(7, 8, full=True)["write"] == 70  # 140 GB at 2 GB/s by one process
    assert save_seconds(70, 512, full=False)["bytes"] == 1120e9
    assert save_seconds(70, 512, full=False)["write"] == 22.4  # at the file system's 50 GB/s
    assert save_seconds(70, 512, full=False)["verify"] == 22.4
    assert save_seconds(7, 8, full=False)["verify"] == pytest.approx(112 / (8 * 1.8))  # longer than to read it
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
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        written = MARKED.sub(lambda match: match.group(1) + TABLES[match.group(2)]() + match.group(4), text)
        document.write_text(written, encoding="utf-8")
