"""`RAdam` against `torch.optim.RAdam`, `RAdamScheduleFree` against a float64 reference and against `schedulefree`."""

import copy
import math
import re

import pytest
import schedulefree
import tiny
import torch
from torch import nn

from hf_radam import RAdam, RAdamScheduleFree
from hf_radam.optim import schedule_free_x, x_shards
from hf_radam.optim.radam import rectification
from hf_radam.sharding import LocalSharding

STEPS = 40


def problem(seed: int = 0) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, [torch.randn(16, 6) for _ in range(STEPS)]


def backward(model: nn.Module, batch: torch.Tensor) -> None:
    model.zero_grad()
    model(batch).sin().mean().backward()


def test_radam_is_torch_radam_with_decoupled_decay_step_by_step():
    own, batches = problem()
    theirs = copy.deepcopy(own)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    a = RAdam(own.parameters(), fused=False, **options)
    b = torch.optim.RAdam(theirs.parameters(), decoupled_weight_decay=True, **options)
    for batch in batches:
        for model, optimizer in ((own, a), (theirs, b)):
            backward(model, batch)
            optimizer.step()
        assert tiny.same(tiny.parameters(own), tiny.parameters(theirs))
    b.load_state_dict(a.state_dict())  # and the state is torch's


def reference(p, grads, *, lr, betas, eps=1e-8, weight_decay=0.0, r=0.0, weight_lr_power=2.0, silent_sgd_phase=True):
    """RAdamScheduleFree in float64, written from the three sequences, keeping x: methods section 2.

    Yields (y, x) after each step.
    """
    b1, b2 = betas
    z, x, v = p.double().clone(), p.double().clone(), torch.zeros_like(p, dtype=torch.float64)
    y, total, lr_max = p.double().clone(), 0.0, -1.0
    for t, grad_of in enumerate(grads, start=1):
        g = grad_of(y)
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        rect = float(not silent_sgd_phase)
        v = b2 * v + (1 - b2) * g * g
        if rho > 4:
            rect = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            g = g / ((v / (1 - b2**t)).sqrt() + eps)
        g = g + weight_decay * y
        step = float(lr) * rect
        lr_max = max(step, lr_max)
        weight = t**r * lr_max**weight_lr_power
        total += weight
        c = weight / total if total else 0.0
        z = z - step * g
        x = (1 - c) * x + c * z
        y = (1 - b1) * z + b1 * x
        yield y, x


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"betas": (0.95, 0.99), "r": 1.0, "weight_lr_power": 1.0},
        {"silent_sgd_phase": False},
        {"lr": torch.tensor(0.02)},
    ],
    ids=["plain", "decay", "weighting", "sgd phase", "tensor lr"],
)
def test_schedule_free_follows_the_reference_step_by_step(options, fused):
    options = {"lr": 0.02, "betas": (0.9, 0.95)} | options
    torch.manual_seed(0)
    start, target = torch.randn(5), torch.randn(STEPS, 5, dtype=torch.float64)
    model = nn.ParameterDict({"w": nn.Parameter(start.clone())})
    optimizer = RAdamScheduleFree(model.parameters(), fused=fused, **options)
    optimizer.train()
    expected = reference(start, [lambda y, t=t: torch.cos(y - t) for t in target], **options)
    for t, (y, x) in zip(target, expected, strict=True):
        model["w"].grad = torch.cos(model["w"].detach().double() - t).float()
        grad = model["w"].grad.clone()
        optimizer.step()
        assert torch.equal(model["w"].grad, grad)  # read, not overwritten
        # fp32 against float64 over 40 steps of size 0.02: 40 roundings of 6e-8 on values of size 1, and margin.
        torch.testing.assert_close(model["w"].detach().double(), y, rtol=0, atol=5e-6)
        torch.testing.assert_close(schedule_free_x(model, optimizer)["w"].double(), x, rtol=0, atol=5e-6)


def test_schedule_free_is_schedulefree_bit_for_bit_and_states_are_exchanged():
    own, batches = problem()
    theirs = copy.deepcopy(own)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    a = RAdamScheduleFree(own.parameters(), fused=False, **options)
    b = schedulefree.RAdamScheduleFree(theirs.parameters(), **options)
    for n, batch in enumerate(batches):
        if n == STEPS // 2:  # each continues with the state of the other
            state_of_a, state_of_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
            a.load_state_dict(state_of_b)
            b.load_state_dict(state_of_a)
        for model, optimizer in ((own, a), (theirs, b)):
            optimizer.train()
            backward(model, batch)
            optimizer.step()
        assert tiny.same(tiny.parameters(own), tiny.parameters(theirs))
    a.eval(), b.eval()
    assert tiny.same(tiny.parameters(own), tiny.parameters(theirs))


def trained() -> tuple[nn.Module, RAdamScheduleFree]:
    model, batches = problem()
    optimizer = RAdamScheduleFree(model.parameters(), lr=0.1, betas=(0.9, 0.95))
    optimizer.train()
    for batch in batches[:20]:
        backward(model, batch)
        optimizer.step()
    return model, optimizer


def test_eval_gives_x_and_train_gives_y_back_bit_for_bit():
    model, optimizer = trained()
    y, x = tiny.parameters(model), schedule_free_x(model, optimizer)
    assert not tiny.same(x, y)
    for _ in range(3):
        optimizer.eval()
        optimizer.eval()  # no-op
        assert tiny.same(tiny.parameters(model), x)
        assert tiny.same(schedule_free_x(model, optimizer), x)  # does not depend on the mode
        with pytest.raises(RuntimeError, match=re.escape("Call optimizer.train() first")):
            optimizer.step()
        optimizer.train()
        optimizer.train()
        assert tiny.same(tiny.parameters(model), y)


def test_weights_changed_in_evaluation_mode_or_of_another_state_are_taken_for_x():
    model, optimizer = trained()
    y = tiny.parameters(model)
    optimizer.eval()
    other = copy.deepcopy(model)
    resumed = RAdamScheduleFree(other.parameters(), lr=0.1, betas=(0.9, 0.95))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.train()
    for name, value in tiny.parameters(other).items():  # one rounding each way: no copy of y is in the state
        torch.testing.assert_close(value, y[name], rtol=0, atol=2e-7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    x = tiny.parameters(model)
    optimizer.train()
    for name, p in model.named_parameters():
        expected = 0.9 * x[name].double() + 0.1 * optimizer.state[p]["z"].double()
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-6)


def test_evaluating_restores_weights_and_modes_whatever_happens_inside():
    model, optimizer = trained()
    y, x = tiny.parameters(model), schedule_free_x(model, optimizer)
    with pytest.raises(ZeroDivisionError), optimizer.evaluating():
        assert tiny.same(tiny.parameters(model), x)
        with torch.no_grad():
            model[0].weight.zero_()
        1 / 0  # noqa: B018
    assert tiny.same(tiny.parameters(model), y) and all(g["train_mode"] for g in optimizer.param_groups)
    with optimizer.evaluating(write_x=False):
        optimizer.eval()  # upstream's call: finds evaluation mode and touches nothing
        assert tiny.same(tiny.parameters(model), y)
    assert tiny.same(tiny.parameters(model), y) and all(g["train_mode"] for g in optimizer.param_groups)


def test_x_before_any_step_and_of_frozen_parameters_is_the_weights():
    model, _ = problem()
    model[2].requires_grad_(False)
    optimizer = RAdamScheduleFree([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert tiny.same(schedule_free_x(model, optimizer), tiny.parameters(model))
    sharding = LocalSharding(model.named_parameters())
    assert not dict(x_shards(sharding, optimizer))
    optimizer.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    changed, x = dict(x_shards(sharding, optimizer)), schedule_free_x(model, optimizer)
    assert changed.keys() == {name for name, p in model.named_parameters() if p.requires_grad} < x.keys()
    assert tiny.same(tiny.parameters(model) | changed, x)


SHARED = [
    ({"lr": math.nan}, "lr=nan must be a finite number"),
    ({"lr": -1.0}, "lr=-1.0 must be"),
    ({"lr": torch.ones(2)}, "lr is a tensor of 2 elements"),
    ({"betas": (1.0, 0.9)}, "beta1=1.0 must be at least 0 and below 1"),
    ({"betas": (0.9, math.nan)}, "beta2=nan must be"),
    ({"eps": -1e-8}, "eps=-1e-08 must be"),
    ({"weight_decay": math.inf}, "weight_decay=inf must be"),
]
SCHEDULE_FREE = [
    ({"betas": (0.0, 0.99)}, "beta1=0.0 leaves x undefined"),
    ({"betas": (0.9, 0.6)}, "beta2=0.6 never leaves RAdam's silent phase"),
    ({"r": math.nan}, "r=nan must be"),
    ({"weight_lr_power": -1.0}, "weight_lr_power=-1.0 must be"),
]


@pytest.mark.parametrize(("kind", "cases"), [(RAdam, SHARED), (RAdamScheduleFree, SHARED + SCHEDULE_FREE)])
def test_bad_options_are_refused(kind, cases):
    for options, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            kind([nn.Parameter(torch.zeros(1))], **options)


def test_low_precision_parameters():
    half = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="Keep float32 parameters and train with bf16=True"):
        RAdamScheduleFree([half])
    optimizer = RAdamScheduleFree([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="torch.bfloat16 loses every small change"):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1
    with pytest.warns(UserWarning, match="the second moment stalls there"):
        RAdam([half])


def test_how_long_radam_replaces_a_warm_up():
    """First step at which the rectification reaches 0.9."""
    for beta2, steps in ((0.95, 58), (0.98, 140), (0.99, 277), (0.995, 550), (0.999, 2737)):
        values = [rectification(t, beta2=beta2, threshold=4.0) for t in (steps - 1, steps)]
        assert values[0] < 0.9 <= values[1]
