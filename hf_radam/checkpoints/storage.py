"""Commit folders atomically: stage them, flush them to the disk, then rename them into place.

    run/
      _lock                               held while a process trains in this run
      _staging/checkpoint-500/            being written
      _staging/replaced/checkpoint-500/   the old one of that name, while the new one takes its place
      checkpoint-500/                     complete: it was renamed after all of it was on the disk

A rename within a file system is atomic, so a killed process leaves the old state or the new one. Replacing a folder
takes two renames; `recover_interrupted_save` makes the second one where a process was killed between them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

STAGING, REPLACED, LOCK_NAME = "_staging", "replaced", "_lock"
"""In the run folder, so on its file system; upstream does not push names with a leading underscore to the hub."""
CHUNK = 2**18  # bytes read at once: few enough to be in the processor's cache when they are hashed
HASH_THREADS = min(16, os.cpu_count() or 4)
NOTHING: Mapping[str, tuple[int, str]] = MappingProxyType({})

NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})
NO_LOCKS = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK})
"""Errors of file systems that cannot flush a folder, make hard links, or lock a file."""


class RunInUseError(RuntimeError):
    """Another process trains in the same run folder."""


_held_locks: set[int] = set()


def _close_inherited_locks() -> None:
    """Close the lock files in a forked child, so that a data loader that outlives a killed run does not hold them."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run, so that no other process writes into its folder; the writing rank enters this.

    The lock goes with the process, however it ends. On a file system without locks a warning is logged.

    Raises:
        RunInUseError: if a live process holds the lock.
    """
    if fcntl is None:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    descriptor = _open_lock(run)
    _held_locks.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held_locks:  # else this is a forked child
            _held_locks.remove(descriptor)
            with suppress(OSError):
                (run / LOCK_NAME).unlink()
            os.close(descriptor)


def _open_lock(run: Path) -> int:
    """Open the lock file and lock it."""
    descriptor = os.open(run / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its holder has removed it since
            os.close(descriptor)
            return _open_lock(run)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise RunInUseError(
            f"{run} is in use: {holder} trains in it. Wait until it ends, or choose another output_dir."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        logger.warning("%s is on a file system without locks. Let one run at a time write into it.", run)
    return descriptor


def sha256(file: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_file() or error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def rank_of(file: Path) -> int:
    """Return the rank that wrote a file of a checkpoint, judging by its name; 0 if the name has none."""
    match = re.match(r"(?:__|rng_state_|(?:\w+_)?zero_pp_rank_)(\d+)[_.]", file.name)
    return int(match[1]) if match else 0


class FileHasher:
    """Hash and flush the files of a folder in background threads, while other files are still being written.

    `finish` takes all files in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(HASH_THREADS)
        self._submitted: dict[Path, tuple[tuple[int, int, int], Future[str], Future[None]]] = {}

    def submit(self, files: Iterable[Path]) -> None:
        """Start on complete files; a file that was submitted and has not changed since is skipped."""
        for file in files:
            stat = file.stat()
            version = stat.st_size, stat.st_mtime_ns, stat.st_ino
            if file not in self._submitted or self._submitted[file][0] != version:
                self._submitted[file] = version, self._pool.submit(sha256, file), self._pool.submit(flush, file)

    def finish(
        self, *, only: Callable[[Path], bool] = lambda file: True, known: Mapping[str, tuple[int, str]] = NOTHING
    ) -> dict[str, tuple[int, str]]:
        """Hash and flush the remaining files; return size in bytes and sha256 of every file, by its path in the folder.

        `only` selects the files that this process hashes; `known` are the results of other ranks.
        """
        inside = sorted(path for path in self.folder.rglob("*") if path.is_file() and only(path))
        files = {name: path for path in inside if (name := path.relative_to(self.folder).as_posix()) not in known}
        hashed = {}
        with self._pool:
            self.submit(sorted(files.values(), key=lambda file: -file.stat().st_size))
            for name, file in files.items():
                version, digest, flushed = self._submitted[file]
                flushed.result()
                hashed[name] = version[0], digest.result()
        _flush_folders(self.folder)
        return {**known, **hashed}

    def abort(self) -> None:
        """Stop, and wait until every file is closed; submitted files may have been removed."""
        self._pool.shutdown(cancel_futures=True)


def _flush_folders(root: Path) -> None:
    for folder in [*sorted(path for path in root.rglob("*") if path.is_dir())[::-1], root]:
        flush(folder)


def link_tree(source: Path, target: Path) -> None:
    """Make a folder with the same files: hard links where the file system has them, else flushed copies."""
    os.stat(source)  # `rglob` would find nothing
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
            continue
        try:
            os.link(path, copy)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copy2(path, copy)
            flush(copy)
    _flush_folders(target)


def commit(run: Path, inside: Path) -> None:
    """Rename `run/_staging/<inside>`, which was flushed, to `run/<inside>`; a folder of that name is replaced."""
    staged, target, aside = run / STAGING / inside, run / inside, run / STAGING / REPLACED / inside
    target.parent.mkdir(parents=True, exist_ok=True)
    replaces = target.exists()
    if replaces:
        aside.parent.mkdir(parents=True, exist_ok=True)
        _move(target, aside)
    try:
        _move(staged, target)
    except OSError:
        if replaces and not target.exists():
            _move(aside, target)
        raise
    flush(run)
    if replaces:
        shutil.rmtree(aside)


def _move(source: Path, target: Path) -> None:
    source.rename(target)
    flush(target.parent)
    flush(source.parent)


def interrupted(run: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each checkpoint whose replacement was interrupted: its path, and the folder that belongs there.

    That folder is the staged successor, which was flushed before the first rename, else the old checkpoint.
    """
    staging = run / STAGING
    for aside in sorted([*(staging / REPLACED).glob("checkpoint-*"), *(staging / REPLACED).glob("_*/checkpoint-*")]):
        inside = aside.relative_to(staging / REPLACED)
        if not (run / inside).exists():
            yield run / inside, staging / inside if (staging / inside).is_dir() else aside


def recover_interrupted_save(run: Path) -> None:
    """Finish the renames that a killed process had begun, and remove what it staged. For the writing process only."""
    for target, successor in interrupted(run):
        _move(successor, target)
    remove_staging(run)


def remove_staging(run: Path) -> None:
    """Remove everything that is staged in a run."""
    with suppress(FileNotFoundError):
        shutil.rmtree(run / STAGING)


def remove(run: Path, folder: Path) -> None:
    """Remove a folder of the run atomically: rename it away, then delete it."""
    trash = run / STAGING / "removed" / folder.name
    trash.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(trash)
    shutil.rmtree(trash.parent)
    with suppress(OSError):  # something else is staged
        (run / STAGING).rmdir()
