"""What `hf_radam.checkpoints.storage` does where a file system cannot, or fails, and the hashes it takes.

Oracle of the hashes: hashlib over the bytes read afterwards.
"""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from hf_radam.checkpoints import storage


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint-5" / "ewa").mkdir(parents=True)
    (tmp_path / "checkpoint-5" / "a.json").write_text("{}")
    (tmp_path / "checkpoint-5" / "ewa" / "b.json").write_text("[1]")
    return tmp_path / "checkpoint-5"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_without_hard_links_the_files_are_copied_and_flushed(folder, monkeypatch, code):
    flushed = set()
    flush = storage.flush

    def no_link(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    def spy(path):
        flushed.add(path)
        flush(path)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(storage, "flush", spy)
    copy = folder.parent / "copy"
    storage.link_tree(folder, copy)
    assert contents(copy) == contents(folder) and not (copy / "a.json").samefile(folder / "a.json")
    assert {copy / "a.json", copy / "ewa" / "b.json", copy / "ewa", copy} <= flushed


def test_a_disk_that_fails_to_flush_a_file_is_told(folder, monkeypatch):
    fsync = os.fsync

    def failing(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == "b.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        storage.FileHasher(folder).finish()


def test_both_folders_of_a_rename_are_flushed(folder, monkeypatch):
    run, flushed = folder.parent, []
    flush = storage.flush
    monkeypatch.setattr(storage, "flush", lambda path: (flushed.append(path), flush(path)))
    storage.link_tree(folder, run / storage.STAGING / "_pre_decay" / "checkpoint-5")
    flushed.clear()
    storage.commit(run, Path("_pre_decay", "checkpoint-5"))
    assert {run, run / "_pre_decay", run / storage.STAGING / "_pre_decay"} <= set(flushed)


def test_the_successor_is_taken_where_both_are_there(folder):
    """It was whole before the older one lost its place."""
    staging = folder.parent / storage.STAGING
    storage.link_tree(folder, staging / storage.REPLACED / "checkpoint-9")
    storage.link_tree(folder, staging / "checkpoint-9")
    (staging / "checkpoint-9" / "new.json").write_text("{}")
    assert [now for _, now in storage.interrupted(folder.parent)] == [staging / "checkpoint-9"]
    storage.recover_interrupted_save(folder.parent)
    assert (folder.parent / "checkpoint-9" / "new.json").is_file()


def test_files_hashed_early_and_late_and_rewritten(tmp_path):
    sizes = {"a": 0, "b": 1, "c": storage.CHUNK, "d": 3 * storage.CHUNK + 1, "deep/e": 5}
    (tmp_path / "deep").mkdir()
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"1" * size)
    hasher = storage.FileHasher(tmp_path)
    hasher.submit([tmp_path / "b", tmp_path / "d"])
    hasher.submit([tmp_path / "b"])
    (tmp_path / "d").write_bytes(b"2" * sizes["d"])  # of the same size
    facts = (tmp_path / "d").stat()
    os.utime(tmp_path / "d", ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**7))  # a clock tick later
    assert hasher.finish() == {
        name: (size, hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()) for name, size in sizes.items()
    }
