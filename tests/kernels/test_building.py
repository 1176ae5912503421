"""How the C++ kernels are built and kept: once, complete or not at all, and with a sentence where they cannot be.

Every case is a process of its own with a cache of its own, as a machine's first run has it.
"""

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_radam.kernels import building

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))
ROOT = Path(__file__).parents[2]
ASK = "from hf_radam.kernels import building; print(building.why_not()); building.library()"


def ask(cache, **variables):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=200)


def built(cache):
    return sorted((cache / "hf_radam").iterdir())


def test_it_is_built_once_and_kept(tmp_path):
    assert ask(tmp_path).stdout == "None\n"
    (library,) = built(tmp_path)
    before = library.stat()
    assert library.suffix == ".so" and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    # The compiler can still be asked for its version, but builds nothing.
    only_version = tmp_path / "c++"
    only_version.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {shutil.which("c++")} --version\nexit 7\n')
    only_version.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    refused = ask(tmp_path / "other", PATH=path)
    assert "cannot build the kernels" in refused.stdout and "BuildError" in refused.stderr
    assert ask(tmp_path).stdout == "None\n" and built(tmp_path) == [library]
    assert library.stat().st_mtime_ns == before.st_mtime_ns and library.stat().st_ino == before.st_ino


def test_many_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(tmp_path), range(4)))
    assert {answer.stdout for answer in answers} == {"None\n"} and len(built(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", b"no library"])
def test_a_damaged_one_is_not_used(tmp_path, damage):
    ask(tmp_path)
    (library,) = built(tmp_path)
    library.write_bytes(damage)
    assert ask(tmp_path).stdout == "None\n"


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way of the folder")
    answer = ask(tmp_path / "file", TMPDIR=str(tmp_path))
    assert answer.stdout == "None\n" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_compiler(tmp_path):
    answer = ask(tmp_path, PATH=str(tmp_path), CXX="")
    assert answer.stdout.startswith("there is no C++ compiler (c++, g++, clang++, or one that $CXX names)")
    assert "BuildError: there is no C++ compiler" in answer.stderr


def test_a_compiler_that_is_named_and_does_not_run(tmp_path):
    answer = ask(tmp_path, CXX="/no/such/compiler")
    assert answer.stdout.startswith("the C++ compiler /no/such/compiler does not run")
