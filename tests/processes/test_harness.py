"""The harness runs functions in several processes, tells of failures with their rank, and never waits for ever.

That the back-ends are what they say is part of `test_backends.py`.
"""

import os
import time

import pytest
import torch.distributed as dist
from processes import harness


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


def test_a_failure_is_told_with_its_rank_and_does_not_wait_for_the_others():
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        harness.run(fail_on, 1, raise_error)
    first = str(caught.value).split("rank 0 of 2")[0]
    assert "rank 1 of 2 (ddp): KeyError: 'the cause'" in first and "in raise_error" in first and "last words" in first
    died, other = harness.run(fail_on, 0, die, check=False, grace=3)
    assert died.error == "died with exit code 7" and other.value is None and other.error is not None
    assert time.monotonic() - began < 600  # the barrier would have waited for 1,800 s


def test_a_hang_is_bounded_and_shows_where():
    with pytest.raises(AssertionError) as caught:
        harness.run(fail_on, 1, hang, timeout=6)
    assert str(caught.value).count("had not returned when the time was up") == 2
    assert "in hang" in str(caught.value) and "in barrier" in str(caught.value)
