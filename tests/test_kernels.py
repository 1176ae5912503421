"""The kernels of the schedule-free step and how the C++ ones are built.

Oracles: the step in numpy's float32, one operation after another; torch's own operations. Building is tested in
processes with a cache of their own, as a machine's first run has it, mostly with a small source.
"""

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_radam.optim import fused

pytestmark = pytest.mark.skipif(isinstance(fused.load_library(), str), reason=str(fused.load_library()))
ROOT = Path(__file__).parents[1]
SIZES = (0, 1, 7, 16, 16383, 16384, 16385, 200_001)  # around the ends of vectors and chunks


def scalars(c=0.07, beta1=0.9, beta2=0.99, lr=0.02, weight_decay=0.1, step=9):
    return [beta2, 1 - beta2, 1 / (1 - beta2**step), 1e-6, weight_decay, c, lr * (beta1 * (1 - c) - 1), lr]


def columns(dtype=torch.float32):
    torch.manual_seed(0)
    made = [[torch.randn(size, dtype=dtype) for size in SIZES] for _ in range(4)]
    made[3] = [value.abs() * 0.01 for value in made[3]]
    return made


def test_every_operation_is_rounded_by_itself():
    """Bit for bit. Oracle: the same operations one after another in numpy's float32."""
    given = columns()
    y, g, z, v = ([value.numpy().copy() for value in column] for column in given)
    fused.schedule_free_step(given, scalars())
    beta2, rest2, correction, eps, decay, c, y_rate, z_rate = map(np.float32, scalars())
    for n in range(len(SIZES)):
        v_new = v[n] * beta2 + rest2 * g[n] * g[n]
        direction = g[n] / (np.sqrt(v_new * correction) + eps) + y[n] * decay
        expected = (y[n] + (z[n] - y[n]) * c + direction * y_rate, g[n], z[n] - direction * z_rate, v_new)
        for column, wanted in zip(given, expected, strict=True):
            assert np.array_equal(column[n].numpy(), wanted)


def test_neither_threads_nor_places_matter(monkeypatch):
    """Bit for bit: other numbers of threads, and every element beginning elsewhere in its chunk and vector."""
    expected = columns()
    fused.schedule_free_step(expected, scalars())
    for threads, begin in ((2, 0), (5, 0), (1, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        given = [[value[begin:].clone() for value in column] for column in columns()]
        fused.schedule_free_step(given, scalars())
        for column, wanted in zip(given, expected, strict=True):
            assert all(torch.equal(value, all_of[begin:]) for value, all_of in zip(column, wanted, strict=True))


@pytest.mark.launches  # the compiler of torch
def test_one_compiled_kernel_serves_every_size_and_number(monkeypatch):
    """The kernel for GPUs, on a CPU. Oracle: the C++ kernel."""
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)  # each vector unit takes 2 seconds to try
    kernel = fused.compiled_kernel(torch.float32, torch.device("cpu"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for autocast, numbers in ((False, scalars()), (True, scalars(c=0.5, weight_decay=0.0, beta1=0.95, beta2=0.9))):
        given = columns()
        other = [[value for value in column if value.numel() >= fused.MIN_NUMEL] for column in columns()]
        fused.schedule_free_step(given, numbers)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            kernel(other, numbers)
        for column, expected in zip(other, given, strict=True):
            torch.testing.assert_close(column, expected[2:], rtol=2e-6, atol=2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


# ---- Building ----


@pytest.fixture
def source(tmp_path):
    """A small source, which takes less time to build."""
    file = tmp_path / "small.cpp"
    file.write_text("int number = 1;\n")
    return file


def start(cache, source, **variables):
    """Build or load in a fork of this process; return its pipe and its id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ.update({"XDG_CACHE_HOME": str(cache)} | variables)
            tempfile.tempdir, fused.SOURCE = None, source
            found = fused.load_library.__wrapped__()
            os.write(writing, (found if isinstance(found, str) else "loaded").encode())
        except BaseException as error:
            os.write(writing, f"raised {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    return reading, child


def finish(reading, child):
    """Return "loaded" or the reason why not, or how the process ended."""
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    return answer or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ask(cache, source, **variables):
    return finish(*start(cache, source, **variables))


def built(cache):
    return sorted((cache / "hf_radam").iterdir())


def test_it_is_built_once_and_cached(tmp_path, source):
    assert ask(tmp_path, fused.SOURCE) == "loaded"
    (library,) = built(tmp_path)
    before = library.stat()
    assert library.suffix == ".so" and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert ask(tmp_path, fused.SOURCE) == "loaded"
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert ask(tmp_path, source) == "loaded" and len(built(tmp_path)) == 2
    source.write_text("no C++")
    assert "+ fails: " in ask(tmp_path, source)


def test_many_processes_at_once(tmp_path, source):
    started = [start(tmp_path, source) for _ in range(4)]
    assert {finish(*one) for one in started} == {"loaded"} and len(built(tmp_path)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["folder", "file", "mode"])
def test_what_others_could_have_written_is_not_run(tmp_path, source, whose):
    """A library that would end the process, in a place that another user may write to."""
    ask(tmp_path, source)
    (library,) = built(tmp_path)
    fatal = tmp_path / "fatal.cpp"
    fatal.write_text("#include <cstdlib>\n__attribute__((constructor)) void planted() { _Exit(42); }\n")
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(library), str(fatal)], check=True)
    assert ask(tmp_path, source) == 42  # it runs if only this user can have written it
    if whose == "mode":
        library.parent.chmod(0o777)
    else:
        os.chown(library if whose == "file" else library.parent, 65534, 65534)
    assert ask(tmp_path, source) == "loaded"


def test_a_cache_that_cannot_be_written_to(tmp_path, source):
    found = [*tmp_path.iterdir()]
    assert ask(source, source, TMPDIR=str(tmp_path)) == "loaded"  # a file in the way of the folder
    assert [*tmp_path.iterdir()] == found


def test_compilers_that_do_not_work(tmp_path, source):
    none = ask(tmp_path, source, PATH=str(tmp_path), CXX="")
    assert none == "there is no C++ compiler (g++, c++, clang++, or one that $CXX names)"
    for command, problem in (("/no/such/compiler", "No such file"), ("g++ 'x", "No closing quotation")):
        answer = ask(tmp_path, source, CXX=command)
        assert answer.startswith("the C++ kernels cannot be built or loaded (") and problem in answer
