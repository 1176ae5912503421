"""Folders that are there whole or not at all: written aside, flushed to the disk, then renamed into place.

    run/
      _staging/checkpoint-500/            being written
      _staging/replaced/checkpoint-500/   an older one of that name, while the new one takes its place
      checkpoint-500/                     whole: it got its name by a rename after everything in it was on the disk

A rename within a file system is atomic, so a process that is killed leaves the old state or the new one. Only where a
folder of that name exists are there two renames; `recover` finishes what was begun between them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

STAGING = "_staging"
"""In the run's folder, so in its file system; upstream keeps names with a leading underscore off the hub."""
REPLACED = "replaced"
CHUNK = 2**18
"""Bytes read at once for a checksum: few enough to be still in the processor's cache when they are summed."""
NOTHING: Mapping[str, tuple[int, str]] = MappingProxyType({})
SHA256_THREADS = 4
"""Files of which a process takes the checksums at the same time, and which it flushes meanwhile."""

NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
"""What a file system says that cannot flush a folder on its own; its files are flushed all the same."""
NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})


def sha256(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the operating system write a file, or the entries of a folder, to the disk."""
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
    """The rank that wrote a file of a checkpoint, as its name tells; 0 if it does not."""
    match = re.match(r"(?:__|rng_state_|(?:\w+_)?zero_pp_rank_)(\d+)[_.]", file.name)
    return int(match[1]) if match else 0


class Sealing:
    """Flushes the files of a folder and takes their checksums, those that are written early while others are written.

    Args:
        folder: the folder, all of which `finish` seals.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._pool = ThreadPoolExecutor(SHA256_THREADS)
        self._begun: dict[Path, tuple[tuple[int, int, int], Future[str], Future[None]]] = {}

    def begin(self, files: Iterable[Path]) -> None:
        """Start with these files, which are written to their end; with one that is under way already, nothing."""
        for file in files:
            facts = _identity(file)
            if file not in self._begun or self._begun[file][0] != facts:
                # The disk writes a file while it is read for its checksum.
                self._begun[file] = facts, self._pool.submit(sha256, file), self._pool.submit(flush, file)

    def finish(
        self, *, only: Callable[[Path], bool] = lambda file: True, sealed: Mapping[str, tuple[int, str]] = NOTHING
    ) -> dict[str, tuple[int, str]]:
        """Seal what is left, and the folders.

        Args:
            only: which files this process seals.
            sealed: what others have sealed already: size and sha256, by path in the folder.

        Returns:
            Size in bytes and sha256 of every file, by its path in the folder.
        """
        inside = sorted(self.folder.rglob("*"))
        files = [path for path in inside if path.is_file() and only(path)]
        files = [path for path in files if path.relative_to(self.folder).as_posix() not in sealed]
        with self._pool:
            self.begin(sorted(files, key=lambda file: -file.stat().st_size))
            for file in files:
                self._begun[file][2].result()
            found = {
                file.relative_to(self.folder).as_posix(): (self._begun[file][0][0], self._begun[file][1].result())
                for file in files
            }
        for path in [path for path in inside if path.is_dir()][::-1] + [self.folder]:
            flush(path)
        return {**sealed, **found}

    def abandon(self) -> None:
        """Stop, and wait until no file is open any more; what was begun may be of files that are gone."""
        self._pool.shutdown(cancel_futures=True)


def _identity(file: Path) -> tuple[int, int, int]:
    """Size and what else tells a file from one of its name written later."""
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def link_tree(source: Path, target: Path) -> None:
    """Make a folder with the same files: by hard links where the file system has them, else by copies, flushed."""
    if not source.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))  # `rglob` would find nothing
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
    for path in [path for path in sorted(target.rglob("*")) if path.is_dir()][::-1] + [target]:
        flush(path)


def publish(run: Path, inside: Path) -> None:
    """Give a staged folder its place: `run/_staging/<inside>` becomes `run/<inside>`, safe at every instant.

    A folder that has the name already is moved aside first, and removed afterwards.

    Args:
        run: folder of the run.
        inside: path of the folder in it; `Sealing` or `link_tree` flushed what is staged there.
    """
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
    """Every folder that lost its place to a successor which did not take it any more.

    Yields:
        The path the folder had, and where its successor is, which is whole: it was flushed before the first rename.
    """
    staging = run / STAGING
    for aside in sorted([*(staging / REPLACED).glob("checkpoint-*"), *(staging / REPLACED).glob("_*/checkpoint-*")]):
        inside = aside.relative_to(staging / REPLACED)
        if not (run / inside).exists():
            yield run / inside, staging / inside if (staging / inside).is_dir() else aside


def recover(run: Path) -> None:
    """Finish what a killed process had begun, and remove what it left; nothing that was whole is lost.

    Only a process that is about to write into the run may call this.
    """
    for target, successor in interrupted(run):
        _move(successor, target)
    remove_staging(run)


def remove_staging(run: Path) -> None:
    """Remove whatever is staged in a run."""
    if (run / STAGING).exists():
        shutil.rmtree(run / STAGING)


def remove(run: Path, folder: Path) -> None:
    """Remove a folder of the run at once: it loses its name before its first file goes."""
    trash = run / STAGING / "removed" / folder.name
    trash.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(trash)
    shutil.rmtree(trash.parent)
    if not any((run / STAGING).iterdir()):
        (run / STAGING).rmdir()


def free_space(folder: Path) -> str:
    """Room that is left in the file system of `folder`, for a message."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB free"
    except OSError as error:
        return f"free space unknown: {error}"
