"""How the C++ kernels are built and kept: once, complete or not at all, and with a sentence where they cannot be.

Every case is a process of its own with a cache of its own, as a machine's first run has it.
"""

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from hf_radam.kernels import building

pytestmark = pytest.mark.skipif(building.why_not() is not None, reason=str(building.why_not()))
LOADED = "loaded"


class Answer(NamedTuple):
    """What a process found, in words, and how it ended."""

    words: str
    code: int


def ask(cache, *, source=building.SOURCE, **variables):
    """Build or load in a process of its own, a fork of this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ.update({"XDG_CACHE_HOME": str(cache)} | variables)
            tempfile.tempdir, building.SOURCE = None, source
            found = building._library.__wrapped__()
            os.write(writing, (found if isinstance(found, str) else LOADED).encode())
        except BaseException as error:
            os.write(writing, f"raised {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        words = pipe.read()
    return Answer(words, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def built(cache):
    return sorted((cache / "hf_radam").iterdir())


def test_it_is_built_once_and_kept(tmp_path):
    assert ask(tmp_path).words == LOADED
    (library,) = built(tmp_path)
    before = library.stat()
    assert library.suffix == ".so" and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    # The compiler can still be asked for its version, but builds nothing.
    compiler = shutil.which("g++") or shutil.which("c++")
    wrapper = tmp_path / "wrapper"
    asked = f'#!/bin/sh\n[ "$1" = --version ] && exec {compiler} --version\n'
    wrapper.write_text(asked + f'[ -z "$BUILDS" ] && exit 7\nexec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    assert ask(tmp_path, CXX=str(wrapper), BUILDS="1").words == LOADED
    kept = built(tmp_path)
    assert len(kept) == 2  # another command
    assert ask(tmp_path, CXX=str(wrapper)).words == LOADED and built(tmp_path) == kept
    refused = ask(tmp_path / "other", CXX=str(wrapper))
    assert "wrapper cannot build the kernels" in refused.words
    assert not (tmp_path / "other").exists()
    assert library.stat().st_mtime_ns == before.st_mtime_ns and library.stat().st_ino == before.st_ino


def test_many_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(tmp_path), range(4)))
    assert {answer.words for answer in answers} == {LOADED} and len(built(tmp_path)) == 1


@pytest.mark.parametrize("length", [0, 40, 4000, 20_000, -1])
def test_one_that_was_cut_short_is_built_anew(tmp_path, length):
    ask(tmp_path)
    (library,) = built(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[:length])
    assert ask(tmp_path).words == LOADED
    assert built(tmp_path) == [library] and library.read_bytes() == whole


def test_another_source_is_another_library(tmp_path):
    changed = tmp_path / "changed.cpp"
    changed.write_text(building.SOURCE.read_text() + "// changed\n")
    ask(tmp_path)
    assert ask(tmp_path, source=changed).words == LOADED
    assert len(built(tmp_path)) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["folder", "file", "mode"])
def test_what_others_could_have_written_is_not_run(tmp_path, whose):
    """A library that would end the process, in a place that another user may write to."""
    ask(tmp_path)
    (library,) = built(tmp_path)
    fatal = tmp_path / "fatal.cpp"
    fatal.write_text("#include <cstdlib>\n__attribute__((constructor)) void planted() { _Exit(42); }\n")
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(library), str(fatal)], check=True)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    assert ask(tmp_path).code == 42  # of our own it is run
    if whose == "mode":
        library.parent.chmod(0o777)
    else:
        os.chown(library if whose == "file" else library.parent, 65534, 65534)
    assert ask(tmp_path).words == LOADED


def test_a_cache_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way of the folder")
    answer = ask(tmp_path / "file", TMPDIR=str(tmp_path))
    assert answer.words == LOADED and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_compiler(tmp_path):
    answer = ask(tmp_path, PATH=str(tmp_path), CXX="")
    assert answer.words.startswith("there is no C++ compiler (g++, c++, clang++, or one that $CXX names)")


def test_a_compiler_that_is_named_and_does_not_run(tmp_path):
    answer = ask(tmp_path, CXX="/no/such/compiler")
    assert answer.words.startswith("the C++ compiler /no/such/compiler does not run")
    assert ask(tmp_path, CXX="g++ 'x").words.startswith('CXX="g++ \'x" cannot be read as a command (No closing')


def test_a_compiler_with_arguments_and_a_strange_version(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_bytes(b'#!/bin/sh\n[ "$2" = --version ] && printf "\\377 1.0" && exit 0\nshift\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert ask(tmp_path, CXX=f"{compiler} first").words == LOADED and len(built(tmp_path)) == 1
