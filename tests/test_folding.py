"""An average that moves in the optimizer's pass is the one that moves after it, in any order of calls that is allowed.

Oracle everywhere, but for errors: the same loop without folding, bit for bit.
"""

import copy

import pytest
import tiny
import torch
from test_fused import make

from hf_radam import RAdam, WeightAverage
from hf_radam.kernels import building

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))


def fold_loop(fold, *, steps=14, kind=RAdam, decay=0.9, given=None):
    """Train with `fold(average, optimizers, step)` for each update; the average and what moved with updates."""
    given = given or [torch.nn.Parameter(torch.linspace(-1, 1, 300).roll(n)) for n in range(3)]
    optimizers = [make(kind, given[:2], fused=True), make(kind, given[2:], fused=True)]
    average = WeightAverage([(str(n), p) for n, p in enumerate(given)], decay=decay)
    moved = []
    for step in range(1, steps + 1):
        for n, p in enumerate(given):
            p.grad = torch.full_like(p, 0.1 * step + n)
        fold(average, optimizers, step)
        moved.append(len(average._foldings.moved))
        average.update(step)
    return average, moved


def apart(average, optimizers, step):
    for optimizer in optimizers:
        optimizer.step()


def folded(average, optimizers, step):
    for optimizer in optimizers:
        average.fold_into(optimizer, step)
        optimizer.step()


def folded_together(average, optimizers, step):
    for optimizer in optimizers:
        average.fold_into(optimizer, step)
    apart(average, optimizers, step)


@pytest.mark.parametrize("fold", [folded, folded_together])
def test_several_optimizers_move_one_average(fold):
    """Oracle: the same loop without folding."""
    one, moved = fold_loop(fold)
    assert moved[-1] == 3 and tiny.same(one.averaged_state_dict(), fold_loop(apart)[0].averaged_state_dict())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_state_that_is_refused_changes_nothing(when):
    """Between what folds and the update, and between the update and its average. Oracle: the loop without it."""

    def refuse(average):
        with pytest.raises(ValueError, match="unknown"):
            average.load_state_dict(average.counters() | {"averages": {"x": torch.zeros(2)}})

    def fold(average, optimizers, step):
        for optimizer in optimizers:
            average.fold_into(optimizer, step)
        if step == 12 and when == "before":
            refuse(average)
        apart(average, optimizers, step)
        if step == 12 and when == "after":
            refuse(average)

    one, other = fold_loop(fold)[0], fold_loop(apart)[0]
    assert tiny.same(one.averaged_state_dict(), other.averaged_state_dict()) and one.counters() == other.counters()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_weights_written_after_the_update_are_an_error_also_where_the_average_was_read(reads, left):
    """Read between the two; also where the weight that is written to was not averaged with the update."""
    kept = {}

    def fold(average, optimizers, step):
        kept["average"] = average
        folded(average, optimizers[: 1 if left else 2], step)
        if left:
            optimizers[1].step()
        if step == 12:
            if reads:
                assert average.averages
            with torch.no_grad():
                average.sharding.parameters["2"].mul_(0.5)

    if left and not reads:  # averaged as it is now
        fold_loop(fold)
        return
    with pytest.raises(RuntimeError, match="Something has written to 2 between"):
        fold_loop(fold)
    average = kept["average"]
    for read in (average.averaged_state_dict, average.state_dict, lambda: average.update(13)):
        with pytest.raises(RuntimeError, match="Something has written to 2 between"):
            read()
    state = average.counters() | {"averages": {str(n): torch.zeros(300) for n in range(3)}}
    average.load_state_dict(state)
    assert not any(value.any() for value in average.averages.values())


@pytest.mark.parametrize("reads", [False, True])
def test_an_update_that_is_left_out_is_an_error(reads):
    average, _ = fold_loop(folded, steps=11)
    given = [*average.sharding.parameters.values()]
    optimizer = make(RAdam, given, fused=True)
    for step in range(12, 20):  # the first are not fused
        for p in given:
            p.grad = torch.ones_like(p)
        average.fold_into(optimizer, step)
        optimizer.step()
        if step < 19:
            average.update(step)
    if reads:
        assert average.averages
    for call in (lambda: average.fold_into(optimizer, 20), lambda: average.update(20)):
        with pytest.raises(RuntimeError, match=r"20\) without update\(19\), which has moved the average already"):
            call()
    assert average.update(19) and not average._foldings.moved


def test_parameters_that_share_memory_are_averaged_apart():
    """Oracle: the same loop without folding; the other parameter moves with its update."""

    def given():
        memory = torch.linspace(-1, 1, 500)
        return [torch.nn.Parameter(t) for t in (memory[:300], torch.linspace(0, 1, 300), memory.data[200:])]

    one, moved = fold_loop(folded, given=given())
    other, _ = fold_loop(apart, given=given())
    assert moved[-1] == 1 and tiny.same(one.averaged_state_dict(), other.averaged_state_dict())


def test_a_folding_that_was_not_used_moves_nothing_later():
    """As after an update that a gradient scaler skips; and where folding ends with it."""

    def fold(how):
        def skipping(average, optimizers, step):
            if how is folded and step < 15:
                for optimizer in optimizers:
                    average.fold_into(optimizer, step)
            if step != 14:
                apart(average, optimizers, step)

        return skipping

    one, moved = fold_loop(fold(folded), steps=19)
    assert moved[12:] == [3, *[0] * 6]
    assert tiny.same(one.averaged_state_dict(), fold_loop(fold(apart), steps=19)[0].averaged_state_dict())


def test_a_state_that_is_loaded_is_all_there_is():
    """Also right after a reader had a folded update averaged early: the counters are those of the loop without it."""

    def loading(average, optimizers, step):
        folded(average, optimizers, step)
        if step == 8:
            kept = copy.deepcopy(average.state_dict())
            average.load_state_dict(kept | {"last_step": 7, "num_averaged": 7})

    one, other = fold_loop(loading, steps=9)[0], fold_loop(folded, steps=9)[0]
    assert (one.num_averaged, one.last_step) == (other.num_averaged, other.last_step) == (9, 9)
