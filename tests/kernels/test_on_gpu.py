"""The kernels for GPUs, run on CPUs' tensors, which they take too: the same updates as the C++ kernels'.

Oracles: the C++ kernels, which `test_on_cpu` holds against the formulas; RAdam's formula in Python floats.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.test_on_cpu import RADAM, SCHEDULE_FREE, columns

from hf_radam.kernels import building, on_cpu, on_gpu
from hf_radam.kernels.numbers import RAdamNumbers
from hf_radam.optim.radam import THRESHOLD
from hf_radam.optim.rectification import rectification

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))
CPU = torch.device("cpu")
BOUND = 2e-6


def graphs():
    """How often something was compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def flattened(given):
    """Of each tensor that the compiled kernel takes: parameter, gradient, z and second moment."""
    return [list(quadruple) for quadruple in zip(*given, strict=True) if quadruple[0].numel() >= on_gpu.SMALLEST]


def assert_alike(given, other):
    for column, expected in zip(given, other, strict=True):
        for a, b in zip(column, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)


def test_the_numbers_for_adamw_are_radams():
    """Oracle: the update as RAdam's paper has it, in Python floats."""
    lr, beta1, beta2, eps, decay, step = 0.01, 0.9, 0.99, 1e-2, 0.1, 9
    p, m, v = 0.7, 0.03, 0.002
    factor = rectification(step, beta2=beta2, threshold=THRESHOLD)
    numbers = RAdamNumbers(lr, (beta1, beta2), eps, decay, factor, step).for_adamw()
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    radam = p * (1 - lr * decay) - lr * factor * (m / correction1) * correction2**0.5 / (v**0.5 + eps)
    adamw = p * (1 - numbers["lr"] * numbers["weight_decay"])
    adamw -= numbers["lr"] * (m / correction1) / (v**0.5 / correction2**0.5 + numbers["eps"])
    assert adamw == pytest.approx(radam, rel=1e-12)


def test_radams_update_is_the_one_on_cpus():
    given, other = columns(torch.float32), columns(torch.float32)
    on_cpu.update(given, RADAM)
    versions = [[value._version for value in column] for column in other]
    on_gpu.update(other, RADAM)
    assert_alike(other, given)
    grown = [
        {value._version - old for value, old in zip(column, counts, strict=True)}
        for column, counts in zip(other, versions, strict=True)
    ]
    assert grown == [{1}, {0}, {1}, {1}]  # which torch's kernel does not tell by itself


def test_one_kernel_serves_every_size_and_number():
    kernel = on_gpu.schedule_free_kernel(torch.float32, CPU)
    before = graphs()
    others = dataclasses.replace(SCHEDULE_FREE, c=0.5, weight_decay=0.0, betas=(0.95, 0.9))
    for number, numbers in enumerate((SCHEDULE_FREE, others)):
        given, other = columns(torch.float32), columns(torch.float32)
        on_cpu.update(given, numbers)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(number)), torch.no_grad():
            kernel(flattened(other), numbers.for_kernel())
        for column in (0, 2, 3):
            assert_alike([other[column][2:]], [given[column][2:]])
    assert graphs() == before > 0


IN_A_MODE = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from kernels.test_on_gpu import *
given, other = columns(torch.float32), columns(torch.float32)
on_cpu.update(given, SCHEDULE_FREE)
with FlopCounterMode(display=False), torch.no_grad():
    on_gpu.schedule_free_kernel(torch.float32, CPU)(flattened(other), SCHEDULE_FREE.for_kernel())
assert_alike([c[2:] for c in other], [c[2:] for c in given])
print("alike")
"""


def test_where_the_kernel_cannot_run_the_update_is_the_same():
    """In a process of its own: there is no kernel any more afterwards."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_MODE], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout.split() == ["alike"], done.stderr
