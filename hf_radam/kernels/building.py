"""Build the C++ kernels with the machine's compiler, once, and load them; no part of torch is compiled or linked.

The library is kept in `$XDG_CACHE_HOME/hf_radam` (by default `~/.cache/hf_radam`), under a name made of the source, the
compiler's version, its options and the architecture, so that none is loaded that was built from something else. It ends
with its own sha256: one that was cut short is built anew. Building takes about a second.
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
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("one_pass.cpp")
COMPILERS = ("g++", "c++", "clang++")
"""GCC first: its OpenMP is the one that torch brings."""
# Products and sums are not contracted: results are the same whatever is made a vector. That nobody reads errno or the
# exceptions of a square root allows it to be made one.
OPTIONS = "-std=c++17 -O3 -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
SECONDS = 120
UPDATES = [f"{kind}_{dtype}" for kind in ("radam", "schedule_free") for dtype in ("float32", "float64")]
AVERAGES = [f"average_{dtype}" for dtype in ("float32", "float64", "bfloat16")]


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
        compiler = _compiler()
        command = [*compiler, *_processor_options(), *OPTIONS]
        told = [SOURCE.read_text(encoding="utf-8"), _version(compiler), platform.machine(), *command]
        key = hashlib.sha256("\0".join(told).encode(errors="surrogateescape")).hexdigest()
        kept = _cache() / f"one_pass-{key[:20]}.so"
        if _is_whole(kept):
            with contextlib.suppress(OSError):  # where nothing may be executed
                return _loaded(kept)
        with tempfile.TemporaryDirectory(prefix="hf_radam-", ignore_cleanup_errors=True) as folder:
            built = Path(folder) / kept.name
            _build(command, built)
            _keep(built, kept)
            return _loaded(built)
    except (BuildError, OSError, ValueError) as error:
        return str(error) if isinstance(error, BuildError) else f"the kernels cannot be built or loaded ({error})"


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    absent = [name for name in UPDATES + AVERAGES if not hasattr(found, name)]
    if absent:
        raise BuildError(f"the kernels in {path} lack {absent[0]}: remove the file")
    return found


# ---- The compiler ----


def _compiler() -> list[str]:
    """`$CXX` if it is set, or what is found."""
    try:
        wanted = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']!r} cannot be read as a command ({error})") from None
    found = wanted or [path for path in map(shutil.which, COMPILERS) if path][:1]
    if not found:
        raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or one that $CXX names)")
    return found


def _processor_options() -> list[str]:
    """Wider vectors where this processor has them; more would not be faster, as memory is what limits."""
    wide = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return ["-mavx2", "-mfma"] if wide else []


def _version(compiler: list[str]) -> str:
    done = _run([*compiler, "--version"])
    if done.returncode:
        raise BuildError(f"{shlex.join(compiler)} --version fails: {done.stderr.strip()[:300]}")
    return done.stdout


def _build(command: list[str], path: Path) -> None:
    """Compile, and end the file with its sha256, which a loader passes over."""
    done = _run([*command, "-o", str(path), str(SOURCE)])
    if done.returncode:
        raise BuildError(f"{command[0]} cannot build the kernels: {done.stderr.strip()[:300]}")
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {SECONDS} s") from None
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]} does not run ({error})") from None


# ---- The cache ----


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(given):
        raise BuildError(f"{given!r} is no absolute path of a cache: set XDG_CACHE_HOME or HOME")
    return Path(given) / "hf_radam"


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user can have written it: what is loaded is run."""
    about = path.lstat()
    return about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(path: Path) -> bool:
    """Whether a kept library is there, ours, and as it was written."""
    try:
        if not (_is_ours(path.parent) and _is_ours(path)):
            return False
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _keep(built: Path, kept: Path) -> None:
    """Put a library into the cache, complete or not at all, if that can be: other processes may be doing the same."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_ours(kept.parent):
            return
        handle, partial = tempfile.mkstemp(dir=kept.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(built.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o700)
            os.replace(partial, kept)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
