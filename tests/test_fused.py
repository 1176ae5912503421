"""Fused steps are the unfused ones, and are taken by default wherever that is possible.

Oracles: the unfused optimizers in the same dtype; a state moves between them and upstream's classes.
Tolerance: torch contracts some products and sums, and divides where a kernel multiplies by the inverse, so each
operation differs in the last bit or two. Weights of order 1 that move by 0.01 a step accumulate some 200 such
differences, which mostly cancel: 20 units in the last place.
"""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import limits
import pytest
import schedulefree
import torch

from hf_radam import RAdam, RAdamScheduleFree
from hf_radam.optim import fused

pytestmark = pytest.mark.skipif(isinstance(fused.load_library(), str), reason=str(fused.load_library()))
ROOT = Path(__file__).parents[1]
STEPS = 200
SHAPES = ((64, 64), (4096,), (33,), (130, 77), (2, 50, 40))
OPTIONS = {
    RAdam: [{}, {"weight_decay": 0.1, "betas": (0.95, 0.99)}, {"eps": 1e-3, "betas": (0.0, 0.95)}],
    RAdamScheduleFree: [
        {},
        {"weight_decay": 0.1, "betas": (0.95, 0.99)},
        {"silent_sgd_phase": False, "r": 1.0},
        {"eps": 1e-3, "betas": (0.98, 0.95), "weight_lr_power": 0.0, "foreach": False},
    ],
}
CASES = [
    pytest.param(kind, options, dtype, id=f"{kind.__name__} {options} {dtype}")
    for kind in OPTIONS
    for options in OPTIONS[kind]
    for dtype in ((torch.float32, torch.float64) if options is OPTIONS[kind][-1] else (torch.float32,))
]
both_optimizers = pytest.mark.parametrize("kind", OPTIONS)


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


def train(optimizer, given, steps=range(STEPS), *, keeps_gradients=True):
    """Gradients that depend on the weights, clipped now and then; one parameter has none at times."""
    for n in steps:
        generator = torch.Generator().manual_seed(n)
        for number, p in enumerate(given):
            noise = torch.randn(p.shape, generator=generator)
            p.grad = None if number == 1 and n % 7 == 3 else noise.to(p.dtype) + 0.1 * p.detach()
        if n % 5 == 0:
            torch.nn.utils.clip_grad_norm_(given, 1.0)
        before = [None if p.grad is None else p.grad.clone() for p in given]
        optimizer.step()
        pairs = zip(given, before, strict=True)
        assert not keeps_gradients or all(g is None or torch.equal(p.grad, g) for p, g in pairs)


def tensors(optimizer, given):
    """Yield weights and optimizer states."""
    for p in given:
        yield p.detach()
        yield from optimizer.state[p].values()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(*one), tensors(*other), strict=True))


def assert_close(one, other, bound=3e-6):
    for a, b in zip(tensors(*one), tensors(*other), strict=True):
        torch.testing.assert_close(b, a.to(b.dtype), rtol=bound, atol=bound)


def unfused_and_fused(kind, run, given_of=parameters, **options):
    """Return optimizer and parameters after `run(optimizer, parameters)`, of both: the first is the oracle."""
    ends = []
    for flag in (False, None):
        given = given_of()
        optimizer = make(kind, given, fused=flag, **options)
        run(optimizer, given)
        ends.append((optimizer, given))
    return ends


@pytest.mark.parametrize(("kind", "options", "dtype"), CASES)
def test_fused_is_unfused(kind, options, dtype):
    unfused, default = unfused_and_fused(kind, train, lambda: parameters(dtype), **options)
    for p, begin in zip(unfused[1], parameters(dtype), strict=True):
        assert (p - begin).abs().max() > 0.05
    assert_close(unfused, default, bound=20 * torch.finfo(dtype).eps)
    assert not same(unfused, default)  # or nothing was fused
    for a, b in zip(unfused[0].param_groups, default[0].param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


@both_optimizers
def test_a_state_moves_between_fused_unfused_and_upstreams_class(kind):
    upstream = {RAdam: torch.optim.RAdam, RAdamScheduleFree: schedulefree.RAdamScheduleFree}[kind]
    own = {RAdam: {"decoupled_weight_decay": True}, RAdamScheduleFree: {}}[kind]
    given = parameters()
    first = make(kind, given)
    assert [copy.deepcopy(make(kind, given, fused=flag)).fused for flag in (None, True, False)] == [None, True, False]
    train(first, given, range(20))

    def resumed(target, end, **options):
        copied = [torch.nn.Parameter(p.detach().clone()) for p in end[1]]
        other = make(target, copied, **options)
        other.load_state_dict(copy.deepcopy(end[0].state_dict()))
        return other, copied

    ends = [resumed(target, (first, given), **options) for target, options in ((kind, {}), (upstream, own))]
    train(first, given, range(20, 30))
    for end in ends:
        train(*end, range(20, 30), keeps_gradients=end is ends[0])
    assert same((first, given), ends[0])  # bit for bit as if it had not stopped
    assert_close((first, given), ends[1])
    back = resumed(kind, ends[1])
    for end in ((first, given), back):
        train(*end, range(30, 40))
    assert_close((first, given), back)


# ---- When steps are fused ----

WITHOUT_COMPILER = """
import torch
from hf_radam import RAdam, RAdamScheduleFree, WeightAverage
from hf_radam.optim import fused
def steps(kind, count=8, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20))
    optimizer = kind([p], lr=0.1, **options)
    getattr(optimizer, "train", int)()
    for _ in range(count):
        p.grad = p.detach() * 0.3
        optimizer.step()
    return p
steps(RAdam), steps(RAdamScheduleFree, 4), steps(RAdamScheduleFree, fused=False)
assert fused.load_library.cache_info().misses == 0  # needed no kernel
assert torch.equal(steps(RAdamScheduleFree), steps(RAdamScheduleFree, fused=False))
weight = torch.nn.Parameter(torch.ones(30, dtype=torch.bfloat16))
average = WeightAverage([("w", weight)], decay=0.75)
average.update(1), weight.data.zero_(), average.update(2)
assert torch.allclose(average.averages["w"], torch.tensor(0.75 / 1.75)) and fused.load_library.cache_info().misses == 1
steps(RAdamScheduleFree, fused=True)
"""


def test_without_a_compiler_everything_works_and_only_true_is_an_error(tmp_path):
    """In an environment in which no program can be found, and nothing was compiled before."""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = limits.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment)
    assert done.stderr.count("RAdamScheduleFree takes unfused steps, which are slower: there is no C++ compiler") == 1
    assert "ValueError: fused=True is not possible: there is no C++ compiler" in done.stderr, done.stderr


@pytest.mark.parametrize("flag", [False, None, True])
def test_complex_parameters_are_not_fused_and_true_says_why(flag, caplog):
    """From the first rectified step on; before that, nothing is asked."""
    p = torch.nn.Parameter(torch.zeros(10, dtype=torch.complex64))
    optimizer = RAdam([p], fused=flag)
    p.grad = torch.ones_like(p)
    for _ in range(5):
        optimizer.step()
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"a parameter is complex64\. Leave it out") if flag else nullcontext():
        optimizer.step(), optimizer.step()
    said = "RAdam takes unfused steps, which are slower: a parameter is complex64."
    assert caplog.messages == ([said] if flag is None else [])


# ---- Unusual tensors and circumstances ----


@both_optimizers
def test_autograd_notices_that_the_weights_have_moved(kind):
    given = parameters()
    optimizer = make(kind, given)
    train(optimizer, given, range(12))
    loss = (given[0] ** 2).sum()
    versions = [value._version for value in tensors(optimizer, given[:1])]
    optimizer.step()
    assert {value._version - v for value, v in zip(tensors(optimizer, given[:1]), versions, strict=True)} == {1}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_fused_step_takes_tensors_whose_memory_does_not_tell_their_value_or_is_shared():
    """`zero` has no memory, a subclass may keep anything there, and parameters at one address follow one another."""
    subclass = type("Subclass", (torch.Tensor,), {})
    plain, shared = torch.zeros(8), torch.zeros(8)
    strange = [plain.as_subclass(subclass), torch._neg_view(plain), torch._efficientzerotensor(8), plain.double()]
    pairs = [(torch.zeros(8), plain), (shared, plain), (shared.view(8), plain)]
    pairs += [(torch.zeros(8), gradient) for gradient in strange]
    entries = [(p, gradient, torch.zeros(8), torch.zeros(8)) for p, gradient in pairs]
    groups, rest = fused.group_for_fusing(entries)
    assert [[id(entry) for entry in group] for group in groups] == [[id(entries[0])]]
    assert [*map(id, rest)] == [*map(id, entries[1:])]


@both_optimizers
def test_sparse_gradients_are_refused_before_anything_changes(kind):
    given = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))]
    optimizer = make(kind, given)
    for value in (torch.ones(4, 4), torch.eye(4).to_sparse()):
        given[value.is_sparse].grad = value
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in given) and optimizer.param_groups[0].get("k", 0) == 0


def test_parameters_that_cannot_be_fused_do_not_hold_back_the_others(monkeypatch, caplog):
    given = [torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    calls, kernel = [], torch._fused_adamw_
    monkeypatch.setattr(
        torch, "_fused_adamw_", lambda *args, **kwargs: calls.append(args[0]) or kernel(*args, **kwargs)
    )
    with pytest.warns(UserWarning, match="some are torch.bfloat16"):
        optimizer = RAdam(given, lr=0.1)
    for _ in range(8):
        for p in given:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert calls and all(len(moved) == 1 and moved[0] is given[0] for moved in calls)
    assert given[1].max() < 1 and "RAdam takes unfused steps, which are slower: a parameter is bfloat16" in caplog.text


@both_optimizers
@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr=-1.0"), ({"eps": float("nan")}, "eps=nan"), ({"betas": (0.9, 1.0)}, "beta2=1.0 must be")],
)
def test_the_options_of_a_group_are_checked(kind, options, message):
    given = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = kind(given[:1], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": given[1:], **options})
    assert len(optimizer.param_groups) == 1
    if kind is RAdamScheduleFree:
        with pytest.raises(ValueError, match="beta2=0.5 never leaves RAdam's silent phase"):
            kind([{"params": given, "betas": (0.9, 0.5)}], lr=0.1)
