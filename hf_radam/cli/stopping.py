"""End a command on Ctrl-C, SIGTERM or SIGHUP: what it began is removed, and one line says which signal it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """A signal asked the command to end; what it began is removed while this propagates."""


class Stop:
    """Handle the signals that ask a command to end, while this context is entered.

    Attributes:
        command: name of the command for the line that is printed.
        signal: the first signal, or None.
        begun: whether there is something to remove. Then a signal raises `Stopped`, except during the removal. Before
            that it ends the process at once, since C++ code that is importing a module aborts on an exception.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.signal: signal.Signals | None = None
        self.begun = False
        self._reported = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        """Install the handlers, except for a signal that the process was started to ignore (`nohup`)."""
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if not self.begun:
            os.write(2, f"{self.words}\n".encode())  # print is not reentrant
            os._exit(self.code)
        if not (self._reported or _is_stopping()):
            raise Stopped

    def report(self) -> None:
        """Print which signal ended the command."""
        self._reported = True
        print(self.words, file=sys.stderr)

    @property
    def words(self) -> str:
        """The line that names the signal."""
        return f"{self.command}: ended by {signal.Signals(self.signal or 0).name}"

    @property
    def code(self) -> int:
        """The exit code, as shells have it."""
        return 128 + (self.signal or 0)

    def check(self) -> None:
        """Raise `Stopped` if a signal came: C or Rust code may have turned it into another error."""
        if self.signal is not None:
            raise Stopped


def _is_stopping() -> bool:
    """Return whether `Stopped`, or an error that followed from it, is being handled."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
