"""Time limits that hold on a slow or busy machine: they count work and silence, not seconds on the wall.

A process is given up if it and its children use almost no processor time for `seconds` on end (it hangs), or in all
`SPINNING` times as many seconds of processor time (it never ends). A machine that is busy with other work gives the
processes less of its time, but some of it always.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import psutil

HANG = 120.0
"""Seconds without work after which a process hangs."""
SPINNING = 10
IDLE = 0.01
"""Processor time per second of the wall clock below which a process does not work."""
POLL = 0.1


class Limit:
    """The limit of some processes and their children.

    Args:
        pids: the processes.
        seconds: of silence that they are allowed.
    """

    def __init__(self, pids: Iterable[int], seconds: float = HANG):
        self.pids, self.seconds = list(pids), seconds
        self.begin = self.seen = self._used()
        self.since = self.asked = time.monotonic()

    def passed(self) -> bool:
        """Whether the processes have hung or worked for too long; to be asked again and again."""
        now = time.monotonic()
        if now - self.asked < POLL:
            return False
        self.asked, used = now, self._used()
        if used < self.seen or used - self.seen > IDLE * max(1.0, now - self.since):  # less: a child has ended
            self.seen, self.since = used, now
        return now - self.since > self.seconds or used - self.begin > SPINNING * self.seconds

    def _used(self) -> float:
        processes = []
        for pid in self.pids:
            with suppress(psutil.Error):
                parent = psutil.Process(pid)
                processes += [parent, *parent.children(recursive=True)]
        used = 0.0
        for process in processes:
            with suppress(psutil.Error):
                used += sum(process.cpu_times()[:4])  # its own and that of the children that it has waited for
        return used


def communicate(process: subprocess.Popen, seconds: float = HANG) -> tuple[Any, Any]:
    """Do as `process.communicate()` does within the limit.

    Raises:
        subprocess.TimeoutExpired: with what the process wrote; it has been killed.
    """
    limit = Limit([process.pid], seconds)
    while True:
        try:
            return process.communicate(timeout=POLL * 1.01)
        except subprocess.TimeoutExpired:
            if limit.passed():
                process.kill()
                raise subprocess.TimeoutExpired(process.args, seconds, *process.communicate()) from None


def run(command: Iterable[Any], *, seconds: float = HANG, **options: Any) -> subprocess.CompletedProcess:
    """Run a command as `subprocess.run` does, within the limit; its output is captured as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    words = [*map(os.fspath, command)]
    with subprocess.Popen(words, **options) as process:
        try:
            output, errors = communicate(process, seconds)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = HANG) -> None:
    """Wait until something is so, for as long as a process works for it; without one, for so many seconds.

    Raises:
        AssertionError: if the process ends or passes its limit before.
    """
    limit = Limit([process.pid] if process else [], seconds)
    while not reached():
        ended = process is not None and process.poll() is not None
        assert reached() or not (ended or limit.passed()), "the process ended or hangs, and it is not so"
        time.sleep(0.001)
