"""Two processes cannot train in one run folder: the lock is held by one of them and goes with it, however it ends."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_radam.checkpoints import storage
from hf_radam.checkpoints.storage import LOCK_NAME, RunInUseError, run_lock

HOLD = """
import os, sys, time
from pathlib import Path
from hf_radam.checkpoints.storage import run_lock
with run_lock(Path(sys.argv[1])):
    started, tell = os.pipe()
    child = os.fork() if sys.argv[2] == "fork" else -1
    if child == 0:
        os.close(1)
        os.write(tell, b"1")
        time.sleep(60)
    if child > 0:
        os.read(started, 1)
    print(os.getpid(), child, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock of `tmp_path`; returns it, its id, and that of a child it has forked."""
    started, children = [], []

    def start(how="alone"):
        environment = os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[2])}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        holder, child = map(int, process.stdout.readline().split())
        children.extend([child] if child > 0 else [])
        return process, holder

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, hold):
    process, holder = hold()
    with pytest.raises(RunInUseError, match=rf"is in use: process {holder} on .* Wait until it ends, or choose"):
        with run_lock(tmp_path):
            pass
    process.communicate("\n")
    with run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_killed_process_leaves_no_lock(tmp_path, hold, how):
    process, _ = hold(how)
    process.kill()
    process.wait()
    with run_lock(tmp_path):  # the forked child lives on
        pass


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with run_lock(tmp_path / "new" / "run"):
        pass
    (record,) = caplog.records
    assert "file system without locks" in record.getMessage()
