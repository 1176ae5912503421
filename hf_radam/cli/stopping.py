"""A command that is asked to end (Ctrl-C, SIGTERM, SIGHUP) removes what it has begun, says one line and ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

CODE = 128
"""Added to the number of the signal it is the exit code, as shells have it."""


class Stopped(BaseException):
    """The command was asked to end; what it has begun is removed on the way out."""


class Stop:
    """While it is entered, a signal that asks to end ends the process, or raises `Stopped` where there is a way out.

    Attributes:
        command: whose line it is.
        signal: the first that came, or None.
        begun: whether there is something to remove. Then a signal raises `Stopped`, but for one that comes while that
            is done. Before, nothing may be raised: modules are imported, and C++ that imports one aborts at that.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.signal: signal.Signals | None = None
        self.begun = False
        self._told = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        """Take the signals, but for one that the process was started to ignore (`nohup`)."""
        if threading.current_thread() is threading.main_thread():  # Python has it that no other one can
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if not self.begun:
            os.write(2, f"{self.words}\n".encode())  # whoever was interrupted may be printing
            os._exit(self.code)
        if not (self._told or _ending()):
            raise Stopped

    def tell(self) -> None:
        """Say which signal it was that ended the command."""
        self._told = True
        print(self.words, file=sys.stderr)

    @property
    def words(self) -> str:
        """Which signal it was."""
        assert self.signal is not None, "only of a command that was stopped"
        return f"{self.command}: ended by {self.signal.name}"

    @property
    def code(self) -> int:
        """The exit code."""
        assert self.signal is not None, "only of a command that was stopped"
        return CODE + self.signal

    def check(self) -> None:
        """Raise `Stopped` if a signal came.

        Where it comes while C or Rust calls Python, they may make another error of what was raised there: so ask before
        an error is told.
        """
        if self.signal is not None:
            raise Stopped


def _ending() -> bool:
    """Whether `Stopped`, or what came of it, is being handled where the signal came."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
