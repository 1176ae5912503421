"""Two processes cannot train in one run folder: the lock is held by one of them and goes with it, however it ends."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hf_radam.checkpoints import storage
from hf_radam.checkpoints.storage import LOCK_NAME, RunInUseError, run_lock

HOLD = """
import os, sys, time
from pathlib import Path
from hf_radam.checkpoints.storage import run_lock
with run_lock(Path(sys.argv[1])):
    started, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(1)
        os.write(tell, b"1")
        time.sleep(60)
    os.read(started, 1)
    print(os.getpid(), child, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`, and has a forked child; the process, and its id."""
    environment = os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    pid, child = map(int, process.stdout.readline().split())
    yield process, pid
    process.kill()
    process.communicate()
    os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, holder):
    process, pid = holder
    with pytest.raises(RunInUseError, match=rf"is in use: process {pid} on .* Wait until it ends, or choose"):
        with run_lock(tmp_path):
            pass
    process.communicate("\n")
    with run_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()


def test_a_training_takes_the_lock(tmp_path, holder):
    with pytest.raises(RunInUseError, match="is in use"):
        tiny.trainer(tmp_path, ewa=True, max_steps=1).train()


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    process, _ = holder
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
