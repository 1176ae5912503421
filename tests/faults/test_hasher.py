"""What is flushed and summed in the background has the checksum of what the file holds in the end.

Oracle: hashlib over the bytes read afterwards.
"""

import hashlib
import os

from hf_radam.checkpoints import storage
from hf_radam.checkpoints.storage import CHUNK, FileHasher


def write(file, size: int, seed: int) -> None:
    file.write_bytes(bytes([seed]) * size)


def test_files_begun_early_and_late_and_rewritten(tmp_path):
    sizes = {"a": 0, "b": 1, "c": CHUNK, "d": 3 * CHUNK + 1, "deep/e": 5}
    (tmp_path / "deep").mkdir()
    for name, size in sizes.items():
        write(tmp_path / name, size, seed=1)
    hasher = FileHasher(tmp_path)
    hasher.submit([tmp_path / "b", tmp_path / "d"])
    hasher.submit([tmp_path / "b"])
    write(tmp_path / "d", sizes["d"], seed=2)  # of the same size
    facts = (tmp_path / "d").stat()
    os.utime(tmp_path / "d", ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**7))  # a clock tick later
    found = hasher.finish()
    assert found == {
        name: (size, hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()) for name, size in sizes.items()
    }


def test_what_is_abandoned_may_be_gone(tmp_path):
    write(tmp_path / "a", 3 * CHUNK, seed=1)
    hasher = FileHasher(tmp_path)
    hasher.submit([tmp_path / "a"])
    (tmp_path / "a").unlink()
    hasher.abort()


def test_two_processes_seal_what_one_would(tmp_path):
    (tmp_path / "optimizer_0").mkdir()
    for name in ("optimizer_0/__0_0.distcp", "optimizer_0/__1_0.distcp", "rng_state_1.pth", "config.json"):
        (tmp_path / name).write_bytes(name.encode())
    other = storage.FileHasher(tmp_path).finish(only=lambda file: storage.rank_of(file) == 1)
    assert set(other) == {"optimizer_0/__1_0.distcp", "rng_state_1.pth"}
    (tmp_path / "rng_state_1.pth").write_bytes(b"not read again")
    first = storage.FileHasher(tmp_path).finish(known=other)
    (tmp_path / "rng_state_1.pth").write_bytes(b"rng_state_1.pth")
    assert first == storage.FileHasher(tmp_path).finish()
