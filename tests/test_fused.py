"""Fused updates are the unfused ones: every option, over 200 updates; a state moves between the two and upstream's.

Tolerance: torch contracts some products and sums, and divides where a kernel multiplies by the inverse, so each
operation differs in the last bit or two. Weights of order 1 that move by 0.01 an update accumulate some 200 such
differences, which mostly cancel: 20 units in the last place.
"""

import copy

import pytest
import schedulefree
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_radam import RAdam, RAdamScheduleFree
from hf_radam.kernels import building
from hf_radam.kernels.plain import sharing
from hf_radam.optim.radam import THRESHOLD, rectification

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))
UPDATES = 200
SHAPES = ((64, 64), (4096,), (33,), (130, 77), (2, 50, 40))
OPTIONS = {
    RAdam: [{}, {"weight_decay": 0.1}, {"betas": (0.95, 0.99)}, {"eps": 1e-3, "betas": (0.0, 0.95)}],
    RAdamScheduleFree: [
        {},
        {"weight_decay": 0.1, "betas": (0.95, 0.99)},
        {"silent_sgd_phase": False, "r": 1.0},
        {"eps": 1e-3, "betas": (0.98, 0.95), "weight_lr_power": 0.0, "foreach": False},
    ],
}
CASES = [pytest.param(kind, options, id=f"{kind.__name__} {options}") for kind in OPTIONS for options in OPTIONS[kind]]


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    made[3] = torch.nn.Parameter(made[3].detach().t())  # not contiguous
    return made


def make(kind, given, **options):
    groups = [{"params": given[:2]}, {"params": given[2:], "lr": 2e-2, "weight_decay": 0.01}]
    optimizer = kind(groups, lr=1e-2, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def train(optimizer, given, updates=range(UPDATES), *, keeps_gradients=True):
    """Gradients that depend on the weights, clipped now and then; one parameter has none at times."""
    for n in updates:
        generator = torch.Generator().manual_seed(n)
        for number, p in enumerate(given):
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = None if number == 1 and n % 7 == 3 else noise + 0.1 * p.detach()
        if n % 5 == 0:
            torch.nn.utils.clip_grad_norm_(given, 1.0)
        kept = [None if p.grad is None else p.grad.clone() for p in given]
        optimizer.step()
        unchanged = [p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(given, kept, strict=True)]
        assert all(unchanged) or not keeps_gradients


def tensors(optimizer, given):
    """Weights and all that is kept for them."""
    for p in given:
        yield p.detach()
        yield from (value for value in optimizer.state[p].values())


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(*one), tensors(*other), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_fused_is_unfused(kind, options, dtype):
    runs = []
    for flag in (False, True):
        given = parameters(dtype)
        optimizer = make(kind, given, fused=flag, **options)
        train(optimizer, given)
        runs.append((optimizer, given))
    begin = parameters(dtype)
    bound = 20 * torch.finfo(dtype).eps
    for p, before in zip(runs[0][1], begin, strict=True):
        assert (p - before).abs().max() > 0.05
    for a, b in zip(tensors(*runs[0]), tensors(*runs[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=bound, atol=bound)
    assert not same(*runs)  # or nothing was fused
    for a, b in zip(runs[0][0].param_groups, runs[1][0].param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_state_moves_between_fused_unfused_and_upstreams_class(kind):
    upstream = {RAdam: torch.optim.RAdam, RAdamScheduleFree: schedulefree.RAdamScheduleFree}[kind]
    own = {RAdam: {"decoupled_weight_decay": True}, RAdamScheduleFree: {}}[kind]
    given = parameters()
    first = make(kind, given, fused=True)
    train(first, given, range(20))
    ends = []
    for target, options in ((kind, {"fused": True}), (kind, {"fused": False}), (upstream, own)):
        copied = [torch.nn.Parameter(p.detach().clone()) for p in given]
        other = make(target, copied, **options)
        other.load_state_dict(copy.deepcopy(first.state_dict()))
        train(other, copied, range(20, 30), keeps_gradients=target is not schedulefree.RAdamScheduleFree)
        ends.append((other, copied))
    back = [torch.nn.Parameter(p.detach().clone()) for p in ends[2][1]]
    again = make(kind, back, fused=True)
    again.load_state_dict(copy.deepcopy(ends[2][0].state_dict()))
    train(again, back, range(30, 40))
    train(first, given, range(20, 30))
    assert same((first, given), ends[0])  # bit for bit as if it had not stopped
    for other in ends[1:]:
        assert_close(ends[0], other)
    train(first, given, range(30, 40))
    assert_close((first, given), (again, back))


def test_the_rectification_begins_where_torchs_does():
    """Until rho_t passes 5 torch makes plain momentum updates, and so does the fused optimizer: bit for bit."""
    assert [rectification(step, beta2=0.999, threshold=THRESHOLD) is None for step in (1, 5, 6)] == [True, True, False]
    given, theirs = parameters(), parameters()
    a = make(RAdam, given, fused=True)
    b = make(torch.optim.RAdam, theirs, decoupled_weight_decay=True)
    train(a, given, range(5))
    train(b, theirs, range(5))
    assert same((a, given), (b, theirs))
    train(a, given, range(5, 6))
    train(b, theirs, range(5, 6))
    assert not same((a, given), (b, theirs))


def test_a_copy_stays_fused():
    given = parameters()
    for kind in OPTIONS:
        assert copy.deepcopy(make(kind, given, fused=True)).fused
        assert not copy.deepcopy(make(kind, given)).fused


# ---- What is not as planned ----


def swap_state(optimizer, given):
    for p in given:
        for key in ("z", "exp_avg", "exp_avg_sq"):
            if key in optimizer.state[p]:
                optimizer.state[p][key].data = optimizer.state[p][key].detach().clone() / 2


def swap_weights(optimizer, given):
    for p in given:
        p.data = p.data.clone() * 2


def turn(optimizer, given):
    given[0].data = given[0].data.t()


def unfused_and_fused(kind, run, given_of=parameters, **options):
    """The optimizer and the parameters that `run(optimizer, parameters)` leaves, of both: the first is the oracle."""
    ends = []
    for flag in (False, True):
        given = given_of()
        optimizer = make(kind, given, fused=flag, **options)
        run(optimizer, given)
        ends.append((optimizer, given))
    return ends


def assert_close(one, other):
    for a, b in zip(tensors(*one), tensors(*other), strict=True):
        torch.testing.assert_close(b, a, rtol=3e-6, atol=3e-6)


def stepping(gradient_of):
    """12 updates with gradients made of the parameter."""

    def run(optimizer, given):
        for _ in range(12):
            for p in given:
                p.grad = gradient_of(p)
            optimizer.step()

    return run


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("meddle", [swap_state, swap_weights, turn])
def test_meddled_with_it_is_still_the_unfused_one(kind, meddle):
    def run(optimizer, given):
        train(optimizer, given, range(12))
        meddle(optimizer, given)
        train(optimizer, given, range(12, 20))

    assert_close(*unfused_and_fused(kind, run))


@pytest.mark.parametrize("kind", OPTIONS)
def test_autograd_notices_that_the_weights_have_moved(kind):
    given = parameters()
    optimizer = make(kind, given, fused=True)
    train(optimizer, given, range(12))
    loss = (given[0] ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("flag", [False, True])
def test_a_group_that_maximizes_does(flag):
    p = torch.nn.Parameter(torch.zeros(10))
    optimizer = RAdam([{"params": [p], "maximize": True}], lr=1e-2, fused=flag)
    for _ in range(10):
        p.grad = torch.ones(10)
        optimizer.step()
    assert (p > 0.01).all()


class Strange(torch.Tensor):
    """May keep anything under its address."""


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_tensor_that_is_more_than_its_elements_is_left_to_torch(kind):
    run = stepping(lambda p: (p.detach() * 0.1).as_subclass(Strange))
    assert same(*unfused_and_fused(kind, run, lambda: parameters()[:2]))


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(
    "strange", [torch._neg_view, lambda g: torch._efficientzerotensor(g.shape)], ids=["negated", "zero"]
)
def test_gradients_whose_memory_does_not_tell_their_value(kind, strange):
    run = stepping(lambda p: strange(torch.full_like(p, 0.3)))
    assert_close(*unfused_and_fused(kind, run, lambda: parameters()[:2]))


def of_one_memory(begin):
    torch.manual_seed(0)
    given = [torch.nn.Parameter(torch.randn(100_000)) for _ in range(3)]
    given[2].data = given[0].data[begin:]
    return given


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("begin", [0, 30_000])
def test_parameters_that_share_memory_are_updated_one_after_another(kind, begin):
    def run(*both):
        train(*both, range(20))

    assert_close(*unfused_and_fused(kind, run, lambda: of_one_memory(begin), foreach=False))


def test_which_tensors_share_memory():
    """By hand, from where to where in one memory."""
    memory = torch.zeros(300)
    ends = [(0, 100), (10, 20), (30, 40), (100, 110), (105, 120), (200, 200), (200, 210)]
    assert sharing([memory[begin:end] for begin, end in ends]) == {0, 1, 2, 3, 4}
    assert sharing([memory[:100].view(10, 10).t(), memory[99:100], torch.zeros(9)]) == {0, 1}
    assert sharing([memory[0:10:2], memory[9:12]]) == set() == sharing([])


@pytest.mark.parametrize("kind", OPTIONS)
def test_sparse_gradients_are_refused_before_anything_changes(kind):
    given = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))]
    optimizer = make(kind, given)
    for value in (torch.ones(4, 4), torch.eye(4).to_sparse()):
        given[value.is_sparse].grad = value
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in given) and optimizer.param_groups[0].get("k", 0) == 0


@pytest.mark.parametrize("kind", OPTIONS)
def test_inside_modes_that_watch_operations(kind):
    def run(optimizer, given):
        train(optimizer, given, range(10))
        with FlopCounterMode(display=False), torch.autocast("cpu", dtype=torch.bfloat16):
            train(optimizer, given, range(10, 20))

    assert_close(*unfused_and_fused(kind, run))
