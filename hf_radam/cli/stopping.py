"""A command that is asked to end (Ctrl-C, SIGTERM, SIGHUP) removes what it has begun, says one line and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

CODE = 128
"""Added to the number of the signal it is the exit code, as shells have it."""


class Stopped(BaseException):
    """The command was asked to end; what it has begun is removed on the way out."""


class Stop:
    """While it is entered, the first signal that asks to end raises `Stopped`; further ones do not disturb the ending.

    Attributes:
        signal: the first one, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
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
        if self.signal is None:
            self.signal = signal.Signals(number)
            raise Stopped

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
