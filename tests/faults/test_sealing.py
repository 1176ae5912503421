"""What is flushed and summed in the background has the checksum of what the file holds in the end.

Oracle: hashlib over the bytes read afterwards.
"""

import hashlib
import os

import pytest

from hf_radam.checkpoints.storage import CHUNK, Sealing


def write(file, size: int, seed: int) -> None:
    file.write_bytes(bytes([seed]) * size)


def test_files_begun_early_and_late_and_rewritten(tmp_path):
    sizes = {"a": 0, "b": 1, "c": CHUNK, "d": 3 * CHUNK + 1, "deep/e": 5}
    (tmp_path / "deep").mkdir()
    for name, size in sizes.items():
        write(tmp_path / name, size, seed=1)
    sealing = Sealing(tmp_path)
    sealing.begin([tmp_path / "b", tmp_path / "d"])
    sealing.begin([tmp_path / "b"])
    write(tmp_path / "d", sizes["d"], seed=2)  # of the same size
    facts = (tmp_path / "d").stat()
    os.utime(tmp_path / "d", ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**7))  # a clock tick later
    found = sealing.finish()
    assert found == {
        name: (size, hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()) for name, size in sizes.items()
    }


def test_what_is_abandoned_may_be_gone(tmp_path):
    write(tmp_path / "a", 3 * CHUNK, seed=1)
    sealing = Sealing(tmp_path)
    sealing.begin([tmp_path / "a"])
    (tmp_path / "a").unlink()
    sealing.abandon()


def test_a_file_that_is_not_there_cannot_be_begun(tmp_path):
    with pytest.raises(FileNotFoundError):
        Sealing(tmp_path).begin([tmp_path / "gone"])
