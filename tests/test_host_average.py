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


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).to(dtype)


def walk(model, average, *, overlap, steps):
    """Take steps that write to the weights only after `wait_for_copies()`."""
    for step in steps:
        average.wait_for_copies()
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter)
        average.update(step, overlap=overlap)


def averaged(dtype=torch.float32, *, overlap=True, steps=STEPS):
    model = model_of(dtype)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    walk(model, average, overlap=overlap, steps=range(1, steps + 1))
    return model, average


@pytest.fixture(scope="module")
def at_once():
    """By dtype, averages that have moved at once."""
    return {dtype: averaged(dtype, overlap=False)[1].averaged_state_dict() for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def late(at_once, monkeypatch):
    """Have averages of this process move late, as if the weights lay elsewhere."""
    made = []

    def host_copies(weights, averages):
        made.append(LateCopies(weights))
        return made[-1]

    monkeypatch.setattr(averaging, "host_copies", host_copies)
    return made


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_is_that_of_the_weights_as_they_were(dtype, overlap, late, at_once):
    _, average = averaged(dtype, overlap=overlap)
    (copies,) = late
    assert copies.started == STEPS - 1
    assert bool(copies.pending) == overlap  # not copied yet, or held back at once
    assert tiny.same(average.averaged_state_dict(), at_once[dtype])


@pytest.mark.parametrize("read", ["applied", "exchange", "state_dict"])
def test_whatever_reads_the_average_has_all_of_it(read, late, at_once):
    model, average = averaged()
    if read == "state_dict":
        found = average.state_dict()["averages"]
    else:
        with average.applied(exchange=read == "exchange"):
            found = tiny.parameters(model)
    assert tiny.same(found, at_once[torch.float32])


def test_a_weight_written_to_too_early_is_an_error(late):
    model, average = averaged()
    with torch.no_grad():
        model[1].bias.zero_()
    with pytest.raises(RuntimeError, match=r"written to 1.bias while it was being copied"):
        average.wait_for_copies()


def test_an_error_in_the_thread_is_raised(late):
    model, average = averaged(steps=2)
    late[0].wait = lambda: 1 / 0
    walk(model, average, overlap=True, steps=[3])
    with pytest.raises(ZeroDivisionError):
        average.averaged_state_dict()


class Halves(TrainerCallback):
    """Writes to a weight where the error says that one may."""

    def halve(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)

    on_pre_optimizer_step = on_optimizer_step = halve


def test_callbacks_may_write_where_the_error_says(late, monkeypatch, tmp_path):
    """Oracle: the training whose average moves at once; `processes/test_late_averages.py` evaluates, too."""
    ends = []
    for _ in range(2):
        trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], ewa_every=1)
        trainer.add_callback(Halves())
        trainer.train()
        ends.append(tiny.state(trainer))
        monkeypatch.undo()
    assert [copies.started for copies in late] == [19] and tiny.same(*ends)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype, at_once):
    """Exact, and without a byte on the GPU between steps."""
    model = model_of(dtype).cuda()
    average = WeightAverage(model.named_parameters(), decay=0.9, device="cpu")
    before = torch.cuda.memory_allocated()
    walk(model, average, overlap=True, steps=range(1, STEPS + 1))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(average.averaged_state_dict(), at_once[dtype], rtol=0, atol=1e-6)
