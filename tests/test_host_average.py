"""An average that moves in host memory while the weights' device goes on.

The order of things is tested with a copier that is as late as a busy device could be: it copies when it must, before
other work, and not earlier. Oracle: the average that moves at once. The same runs on a GPU, where there is one.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from torch import nn
from transformers import TrainerCallback

from hf_radam import WeightAverage, averaging

STEPS = 12


class LateCopies:
    """Copies in the last moment at which that is allowed."""

    def __init__(self, weights):
        self.buffers = [torch.full(weight.shape, float("nan"), dtype=weight.dtype) for weight in weights]
        self.thread = ThreadPoolExecutor(1)
        self.started, self.pending = 0, []

    def start(self, weights):
        self.started += 1
        self.pending = [*zip(weights, self.buffers, strict=True)]

    def block_stream(self):
        for weight, buffer in self.pending:
            buffer.copy_(weight)
        self.pending = []

    def wait(self):
        while self.pending:
            time.sleep(0.001)


@pytest.fixture
def late(monkeypatch):
    """Have averages of this process move late, as if the weights lay elsewhere."""
    made = []

    def host_copies(weights, averages):
        made.append(LateCopies(weights))
        return made[-1]

    monkeypatch.setattr(averaging, "host_copies", host_copies)
    return made


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).to(dtype)


def walk(model, average, *, overlap, steps=range(1, STEPS + 1)):
    """Take steps that write to the weights only after `wait_for_copies()`."""
    for step in steps:
        average.wait_for_copies()
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
        average.update(step, overlap=overlap)


def at_once(dtype, **options):
    model = model_of(dtype)
    average = WeightAverage(model.named_parameters(), decay=0.9, **options)
    walk(model, average, overlap=False)
    return average.averaged_state_dict()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_is_that_of_the_weights_as_they_were(dtype, overlap, late, monkeypatch):
    model = model_of(dtype)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    walk(model, average, overlap=overlap)
    (copies,) = late
    assert copies.started == STEPS - 1
    assert bool(copies.pending) == overlap  # not copied yet, or held back at once
    found = average.averaged_state_dict()
    monkeypatch.undo()
    for name, value in at_once(dtype).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("read", ["applied", "state_dict", "averaged_state_dict", "exchange"])
def test_whatever_reads_the_average_has_all_of_it(read, late, monkeypatch):
    model = model_of(torch.float32)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    walk(model, average, overlap=True)
    if read in ("applied", "exchange"):
        with average.applied(exchange=read == "exchange"):
            found = {name: value.detach().clone() for name, value in model.named_parameters()}
    else:
        found = getattr(average, read)()
        found = found.get("averages", found)
    monkeypatch.undo()
    assert tiny.same(found, at_once(torch.float32))


def test_a_weight_written_to_too_early_is_an_error(late):
    model = model_of(torch.float32)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    walk(model, average, overlap=True)
    with torch.no_grad():
        model[1].bias.zero_()
    with pytest.raises(RuntimeError, match=r"written to 1.bias while it was being copied"):
        average.wait_for_copies()


def test_what_fails_in_the_thread_is_raised(late):
    model = model_of(torch.float32)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    walk(model, average, overlap=True, steps=range(1, 3))
    late[0].wait = lambda: 1 / 0
    walk(model, average, overlap=True, steps=range(3, 4))
    with pytest.raises(ZeroDivisionError):
        average.averaged_state_dict()


class Halves(TrainerCallback):
    """Writes to a weight where the error says that one may."""

    def halve(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)

    on_pre_optimizer_step = on_optimizer_step = halve


def test_a_training_is_the_same(late, monkeypatch, tmp_path):
    """Evaluating, saving and writing in between; oracle: the training whose average moves at once."""
    options = tiny.METHODS["ewa"] | {"ewa_every": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps"}
    ends = []
    for name in ("late", "at once"):
        trainer = tiny.trainer(tmp_path / name, **options)
        trainer.add_callback(Halves())
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        ends.append((losses, tiny.parameters(trainer.model), trainer.average.averaged_state_dict()))
        monkeypatch.undo()
    assert late and late[0].started == trainer.state.max_steps - 1
    assert ends[0][0] == ends[1][0]
    assert tiny.same(ends[0][1], ends[1][1]) and tiny.same(ends[0][2], ends[1][2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """Exact, and without a byte on the GPU between steps."""
    model = model_of(dtype).cuda()
    average = WeightAverage(model.named_parameters(), decay=0.9, device="cpu")
    before = torch.cuda.memory_allocated()
    walk(model, average, overlap=True)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    for name, value in at_once(dtype).items():
        torch.testing.assert_close(average.averaged_state_dict()[name], value, rtol=0, atol=1e-6)
