"""The harness runs what it says in the back-end it says, tells of failures with their rank, and never waits for ever.

Oracle for the back-ends: the losses of stock `Trainer` with AdamW under DDP.
"""

import os
import time

import pytest
import tiny
import torch.distributed as dist
from processes import harness
from transformers import Trainer, TrainerCallback


class Losses(TrainerCallback):
    """Keeps every loss as it is logged, and asks in the middle of the training whether the back-end is the one."""

    def __init__(self, backend):
        self.backend, self.trainer = backend, None
        self.losses, self.really = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.really.append(harness.is_really(self.trainer, self.backend))

    def on_log(self, args, state, control, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []


def train(folder, backend, batch=2, asked=None):
    """Three updates by stock `Trainer`; returns its losses and whether it had the back-end."""
    options = {"per_device_train_batch_size": batch, "max_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    arguments = tiny.stock_arguments(folder, optim="adamw_torch", **options | harness.arguments(backend))
    seen = Losses(asked or backend)
    model = tiny.llama(attention_dropout=0.0)
    seen.trainer = Trainer(model, arguments, train_dataset=tiny.TRAIN, callbacks=[seen])
    seen.trainer.train()
    return seen.losses, all(seen.really) and harness.is_really(seen.trainer, seen.backend), arguments.world_size


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    return harness.run(train, tmp_path_factory.mktemp("ddp"), "ddp", backend="ddp")


def require(backend):
    if reason := harness.missing(backend):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_every_backend_is_what_it_says_and_trains_as_ddp(tmp_path, under_ddp, backend):
    require(backend)
    world = 1 if backend == "one" else 2
    each = harness.run(train, tmp_path, backend, batch=4 // world, backend=backend)
    assert [(really, size) for _, really, size in each] == [(True, world)] * world
    for losses, _, _ in each:
        assert len(losses) == 3 and losses == pytest.approx(under_ddp[0][0], abs=1e-5)  # sums in another order


@pytest.mark.parametrize(("backend", "asked"), [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp2_sharded")])
def test_one_backend_is_not_taken_for_another(tmp_path, backend, asked):
    assert not any(really for _, really, _ in harness.run(train, tmp_path, backend, asked=asked, backend=backend))


def add_ranks(first, *, second):
    harness.join_group()
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (dist.get_rank(), first + second, os.environ["SAID"]))
    return gathered


def test_values_go_in_and_come_out(monkeypatch):
    monkeypatch.setenv("SAID", "after the fork server began")
    for world in (1, 3):
        expected = [(rank, "ab", "after the fork server began") for rank in range(world)]
        assert harness.run(add_ranks, "a", second="b", world=world) == [expected] * world


def fail_on(rank, how):
    harness.join_group()
    if dist.get_rank() == rank:
        print("the last words", flush=True)
        how()
    dist.barrier()


def raise_error():
    raise KeyError("the cause")


def die():
    os._exit(7)


def hang():
    time.sleep(3600)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "told"),
    [(raise_error, ["KeyError: 'the cause'", "in raise_error", "the last words"]), (die, ["died with exit code 7"])],
    ids=["raises", "dies"],
)
def test_a_failure_is_told_with_its_rank_and_does_not_wait_for_the_others(rank, how, told):
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        harness.run(fail_on, rank, how)
    first = str(caught.value).split(f"rank {1 - rank} of 2")[0]
    assert f"rank {rank} of 2 (ddp)" in first
    assert all(words in first for words in told)
    assert time.monotonic() - began < 600  # the barrier would have waited for 1,800 s


def test_a_hang_is_bounded_and_shows_where():
    with pytest.raises(AssertionError) as caught:
        harness.run(fail_on, 1, hang, timeout=6)
    assert str(caught.value).count("had not returned when the time was up") == 2
    assert "in hang" in str(caught.value) and "in barrier" in str(caught.value)


def test_outcomes_instead_of_an_error():
    raised, other = harness.run(fail_on, 0, raise_error, check=False)
    assert raised.error == "KeyError: 'the cause'" and raised.exit_code == 1 and "the last words" in raised.output
    assert other.rank == 1 and other.value is None and other.error is not None


def test_a_value_that_cannot_come_back_is_an_error():
    with pytest.raises(AssertionError, match="rank 0 of 1 .one.: .*[Pp]ickle"):
        harness.run(eval, "lambda: 0", backend="one")


def test_a_backend_that_does_not_exist():
    with pytest.raises(ValueError, match="backend must be one of"):
        harness.run(die, backend="fsdp1")
