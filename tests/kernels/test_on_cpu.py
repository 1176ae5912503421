"""The C++ kernels, each against the formula in float64, for sizes around the ends of vectors and chunks.

Oracles: the papers' formulas in float64, rounded once at the end, so that float32 results may differ by a few units in
the last place; for averages torch's `lerp` and the same in float64.
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_radam.kernels import average_update, building, on_cpu
from hf_radam.kernels.numbers import RAdamNumbers, ScheduleFreeNumbers
from hf_radam.optim.radam import THRESHOLD
from hf_radam.optim.rectification import rectification

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))
ROOT = Path(__file__).parents[2]
SIZES = (0, 1, 7, 16, 16383, 16384, 16385, 200_001)
FACTOR = rectification(9, beta2=0.99, threshold=THRESHOLD)
RADAM = RAdamNumbers(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, factor=FACTOR, step=9)
SCHEDULE_FREE = ScheduleFreeNumbers(lr=0.02, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, c=0.07, step=9)
UPDATES = {"radam": RADAM, "schedule_free": SCHEDULE_FREE}


def columns(dtype):
    torch.manual_seed(0)
    made = [[torch.randn(size, dtype=dtype) for size in SIZES] for _ in range(4)]
    made[3] = [value.abs() * 0.01 for value in made[3]]
    return made


def copies(given):
    return [[value.clone() for value in column] for column in given]


def expected_radam(p, g, m, v):
    beta1, beta2, lr, step = 0.9, 0.99, 0.01, 9
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    direction = m / (1 - beta1**step) * math.sqrt(1 - beta2**step) / (v.sqrt() + 1e-6)
    return p * (1 - lr * 0.1) - lr * FACTOR * direction, m, v


def expected_schedule_free(y, g, z, v):
    beta1, beta2, lr, step, c = 0.9, 0.99, 0.02, 9, 0.07
    v = beta2 * v + (1 - beta2) * g * g
    direction = g / ((v / (1 - beta2**step)).sqrt() + 1e-6) + 0.1 * y
    return (1 - c) * y + c * z + lr * (beta1 * (1 - c) - 1) * direction, z - lr * direction, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", UPDATES)
def test_an_update_is_the_formula(kind, dtype):
    given = columns(dtype)
    before = copies(given)
    on_cpu.update(given, UPDATES[kind])
    oracle = {"radam": expected_radam, "schedule_free": expected_schedule_free}[kind]
    bound = 8 * torch.finfo(dtype).eps
    for parameter, gradient, first, second, *old in zip(*given, *before, strict=True):
        assert torch.equal(gradient, old[1])
        for value, wanted in zip((parameter, first, second), oracle(*(o.double() for o in old)), strict=True):
            torch.testing.assert_close(value.double(), wanted, rtol=bound, atol=bound)
            assert not value.numel() or not torch.equal(value, old[0])


def test_every_operation_is_rounded_by_itself():
    """Bit for bit. Oracle: the same operations one after another in numpy's float32."""
    given = columns(torch.float32)
    y, g, z, v = ([value.numpy().copy() for value in column] for column in given)
    on_cpu.update(given, SCHEDULE_FREE)
    beta2, rest2, correction, eps, decay, c, y_rate, z_rate = map(np.float32, SCHEDULE_FREE.for_kernel())
    for n in range(len(SIZES)):
        v_new = v[n] * beta2 + rest2 * g[n] * g[n]
        direction = g[n] / (np.sqrt(v_new * correction) + eps) + y[n] * decay
        expected = (y[n] + (z[n] - y[n]) * c + direction * y_rate, g[n], z[n] - direction * z_rate, v_new)
        for column, wanted in zip(given, expected, strict=True):
            assert np.array_equal(column[n].numpy(), wanted)


def test_a_large_gradient_overflows_where_torchs_does():
    """A gradient whose square is none of float32's, but (1 - beta2) of it is. Oracle: torch's `addcmul_`."""
    given = [[torch.full((20,), value)] for value in (1.0, 1e20, 1.0, 1.0)]
    on_cpu.update(given, SCHEDULE_FREE)
    wanted = torch.tensor(0.99).addcmul_(torch.tensor(1e20), torch.tensor(1e20), value=1 - 0.99)
    assert torch.isfinite(wanted) and torch.allclose(given[3][0], wanted, rtol=1e-6)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9])
def test_a_first_moment_moves_as_torchs(beta1):
    """From a large gradient to a small one, of which an inexact difference would leave nothing. Oracle: `lerp_`."""
    numbers = RAdamNumbers(lr=0.01, betas=(beta1, 0.99), eps=1e-6, weight_decay=0.0, factor=FACTOR, step=9)
    given = [[torch.full((20,), value)] for value in (1.0, 1e-4, 1e4, 1.0)]
    on_cpu.update(given, numbers)
    wanted = torch.full((20,), 1e4).lerp_(torch.full((20,), 1e-4), 1 - beta1)
    torch.testing.assert_close(given[2][0], wanted, rtol=1e-6, atol=0)


FLUSHING = """
import torch
from hf_radam.kernels import on_cpu
tiny = torch.full((400_000,), 1e-40)
torch.set_num_threads(2)
torch.set_flush_denormal(True)
for _ in range(5):
    average = tiny.clone()
    on_cpu.average([average], [tiny], 0.5)
    assert not average.view(torch.int32).any()
torch.set_flush_denormal(False)
average = tiny.clone()
on_cpu.average([average], [tiny], 0.5)
assert average.view(torch.int32).all()
"""


def test_every_thread_treats_denormals_as_the_calling_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", FLUSHING], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", UPDATES)
def test_neither_threads_nor_places_matter(kind, monkeypatch):
    """Bit for bit: other numbers of threads, and every element beginning elsewhere in its chunk and vector."""
    ends = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        given = columns(torch.float32)
        on_cpu.update(given, UPDATES[kind])
        ends.append(given)
    shifted = [[value[3:].clone() for value in column] for column in columns(torch.float32)]
    on_cpu.update(shifted, UPDATES[kind])
    for number, column in enumerate(ends[0]):
        for other in ends[1:]:
            assert all(torch.equal(a, b) for a, b in zip(column, other[number], strict=True))
        assert all(torch.equal(a[3:], b) for a, b in zip(column, shifted[number], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 0.3, 0.499, 0.5, 0.9, 1.0])
def test_an_average_moves_as_lerp_does(dtype, size):
    averages = [value.float() for value in columns(torch.float32)[0]]
    weights = [value.to(dtype) for value in columns(torch.float64)[1]]
    before = [value.clone() for value in averages]
    average_update(averages, weights, size)
    for average, weight, old in zip(averages, weights, before, strict=True):
        torch.testing.assert_close(average, old.lerp(weight.float(), size), rtol=0, atol=5e-7)
        exact = old.double() + size * (weight.float().double() - old.double())
        torch.testing.assert_close(average.double(), exact, rtol=2e-7, atol=3e-7)


def test_averages_that_no_kernel_takes_move_all_the_same():
    """Strides, another dtype of the average, and a whole beside them. Oracle: `lerp` one by one."""
    torch.manual_seed(0)
    averages = [torch.randn(40, 30).t(), torch.randn(50, dtype=torch.float64), torch.randn(60)]
    weights = [torch.randn(30, 40), torch.randn(50), torch.randn(60)]
    wanted = [a.lerp(w.to(a.dtype), 0.3) for a, w in zip(averages, weights, strict=True)]
    average_update(averages, weights, 0.3)
    for average, value in zip(averages, wanted, strict=True):
        torch.testing.assert_close(average, value, rtol=1e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", UPDATES)
def test_an_average_in_the_same_pass_is_that_of_a_second_pass(kind, dtype):
    """Bit for bit; where there is no average, none is written."""
    given, apart = columns(dtype), columns(dtype)
    averages = [torch.randn(size) if number % 3 else None for number, size in enumerate(SIZES)]
    second = [value if value is None else value.clone() for value in averages]
    on_cpu.update(given, UPDATES[kind], averages=averages, size=0.2)
    on_cpu.update(apart, UPDATES[kind])
    pairs = [(a, p) for a, p in zip(second, apart[0], strict=True) if a is not None]
    on_cpu.average([a for a, _ in pairs], [p for _, p in pairs], 0.2)
    for column, other in zip(given, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(column, other, strict=True))
    for one, two in zip(averages, second, strict=True):
        assert one is two is None or torch.equal(one, two)


def test_what_was_written_counts_as_changed():
    given = columns(torch.float32)
    average = torch.zeros(SIZES[-1])
    versions = [[value._version for value in column] for column in given]
    on_cpu.update(given, RADAM, averages=[None] * (len(SIZES) - 1) + [average], size=0.1)
    grown = [
        [value._version - old for value, old in zip(c, o, strict=True)] for c, o in zip(given, versions, strict=True)
    ]
    assert [set(column) for column in grown] == [{1}, {0}, {1}, {1}] and average._version == 1
