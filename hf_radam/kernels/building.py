"""Build the C++ kernels with the machine's compiler, once, and load them; no part of torch is compiled or linked.

The library is kept in `$XDG_CACHE_HOME/hf_radam` (by default `~/.cache/hf_radam`), under a name made of the source, the
compiler and its options, so that none is ever loaded that was built from something else. Building takes about a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("one_pass.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Products and sums are not contracted: results are the same whatever is made a vector. That nobody reads errno or the
# exceptions of a square root allows it to be made one.
OPTIONS = "-std=c++17 -O3 -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
SECONDS = 120


class BuildError(RuntimeError):
    """The kernels cannot be built on this machine, or not be loaded; says why in a sentence."""


def library() -> ctypes.CDLL:
    """The kernels of this machine, built if they are not there yet; tried once in a process.

    Raises:
        BuildError: without a compiler, or if it or the loader fails.
    """
    found = _library()
    if isinstance(found, str):
        raise BuildError(found)
    return found


def why_not() -> str | None:
    """Why there are no kernels on this machine, in words; None if there are."""
    found = _library()
    return found if isinstance(found, str) else None


@functools.cache
def _library() -> ctypes.CDLL | str:
    try:
        command = _command()
        key = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), _version(command[0]), *command]).encode())
        name = f"one_pass-{key.hexdigest()[:20]}.so"
        try:
            return _kept(command, _cache() / name)
        except OSError:  # nothing can be written there, or nothing that is there can be executed
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                return _kept(command, Path(folder) / name)
    except (BuildError, OSError) as error:
        return str(error)


def _kept(command: list[str], path: Path) -> ctypes.CDLL:
    if not path.is_file():
        _build(command, path)
    return ctypes.CDLL(str(path))


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(given):
        raise FileNotFoundError(f"{given} is no absolute path of a cache")
    return Path(given) / "hf_radam"


def _command() -> list[str]:
    """The compiler (`$CXX` if it is set) and its options for this processor."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = wanted or [path for path in map(shutil.which, COMPILERS) if path][:1]
    if not found:
        raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or one that $CXX names)")
    wide = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return [*found, *OPTIONS, *(["-mavx2", "-mfma"] if wide else [])]


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {compiler} does not run ({error})") from error


def _build(command: list[str], kept: Path) -> None:
    """Write the library, complete or not at all: other processes may be building the same one.

    Raises:
        BuildError: if the compiler fails.
        OSError: if the folder cannot be written to.
    """
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, partial = tempfile.mkstemp(dir=kept.parent, suffix=".so.part")
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, "-o", partial, str(SOURCE)], capture_output=True, text=True, timeout=SECONDS, errors="replace"
        )
        if done.returncode:
            raise BuildError(f"{command[0]} cannot build the kernels: {done.stderr.strip()[:300]}")
        os.replace(partial, kept)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {SECONDS} s for the kernels") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
