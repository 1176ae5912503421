"""The numbers of memory and checkpoints in `docs/scaling.md` follow from the bytes per parameter below.

Oracles: the sums here; the bytes of a real average and optimizer.
"""

import re
from pathlib import Path

import pytest
import torch

from hf_radam import RAdam, RAdamScheduleFree, WeightAverage

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
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
TITLES = {"one process": "one_process", "DDP": "ddp", "FSDP2": "fsdp2"} | {f"ZeRO-{n}": f"zero{n}" for n in (1, 2, 3)}
THREE_DIGITS = 5e-3


def gigabytes(file: str, billions: float, processes: int, *, bf16: bool) -> float:
    """Return the memory that each process holds between the backward pass and the step."""
    full, shared = HELD[file][bf16]
    return billions * (full + shared / processes)


def test_the_table_has_the_bytes_of_every_launch_file():
    rows = re.findall(r"^\| `(\w+)\.yaml` \|[^|]*\| ([^|]*) \| ([^|]*) \|", DOCUMENT, re.MULTILINE)
    formulas = {
        file: [" + ".join([str(full)] * bool(full) + [f"{shared}/N"] * bool(shared)) for full, shared in held.values()]
        for file, held in HELD.items()
    }
    assert {file: found for file, *found in rows} == formulas
    launch_files = {path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml")}
    assert HELD.keys() == launch_files - {"two_machines"}  # which is DDP


def test_the_memory_in_words_is_that_of_the_bytes():
    text = " ".join(DOCUMENT.split())
    sizes = re.findall(r"([\d.]+) GB (?:per process )?with ((?:ZeRO-\d|DDP|FSDP2| or )+)", text)
    found = {TITLES[title]: float(size) for size, titles in sizes for title in titles.split(" or ")}
    wanted = {file: gigabytes(file, 7, 8, bf16=True) for file in HELD if file != "one_process"}
    assert found == pytest.approx(wanted, rel=THREE_DIGITS)
    (large,) = re.findall(r"With the last two, 70 B on 512 GPUs take ([\d.]+) GB", text)
    for file in ("zero3", "fsdp2"):
        assert float(large) == pytest.approx(gigabytes(file, 70, 512, bf16=True), rel=THREE_DIGITS)
    in_brackets = dict(re.findall(rf"({'|'.join(TITLES)}) [\d.]+ \((\d+)\)", text))
    assert in_brackets == {title: f"{gigabytes(file, 1, 2, bf16=False):g}" for title, file in TITLES.items()}


def test_the_sizes_and_times_of_a_large_checkpoint_follow_from_the_assumed_speeds():
    """`model.safetensors`, optimizer and average; with full state dicts FSDP's own copy of the weights, too."""
    paragraph = re.findall(r"<!-- scale: saving -->\n(.*?)<!--", DOCUMENT, re.DOTALL)[0].replace(",", "")
    numbers = [float(one) for one in re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", paragraph)]
    write, read, file_system, sha256 = numbers[-4:]
    billions, processes = 70, 512
    full, sharded = billions * (4 + 4 + OPTIMIZER + AVERAGE), billions * (4 + OPTIMIZER + AVERAGE)
    verify = max(
        full / read, billions * OPTIMIZER / sha256
    )  # a thread of rank 0 hashes the largest file, the optimizer
    wanted = [billions, processes, full, full / write, full / sha256, verify]
    wanted += [sharded, sharded / min(processes * write, file_system), sharded / sha256 / processes, sharded / read]
    wanted += [write, read, file_system, sha256]
    assert numbers == pytest.approx(wanted, rel=THREE_DIGITS)


@pytest.mark.parametrize("kind", [RAdam, RAdamScheduleFree])
def test_optimizers_and_average_take_the_bytes_that_the_document_says(kind):
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
