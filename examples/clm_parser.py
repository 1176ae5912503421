"""How the examples read their command lines, and how they end when something is wrong: one sentence, exit code 2."""

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from hf_radam.config_files import ConfigArgumentParser, close_matches, one_sentence

__all__ = ["InputError", "YamlArgumentParser", "close_matches", "fail", "leave", "one_sentence"]

SPEAK_AFTER = 10  # seconds; launchers look after their processes several times a second


class InputError(ValueError):
    """A request that cannot be carried out as written: its message is the one sentence that the user needs."""


def leave(message: str) -> NoReturn:
    """Print one sentence the way a command line tool does and leave with exit code 2.

    Of the processes that a launcher started on one machine only the first speaks at once. When it leaves, the launcher
    ends the others, so that the same sentence is not told once by each; what went wrong elsewhere only is told later.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(SPEAK_AFTER)
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def fail(error: BaseException) -> NoReturn:
    """Leave with the message of an error."""
    leave(one_sentence(error))


class YamlArgumentParser(ConfigArgumentParser):
    """Flags of dataclasses, after a YAML (or JSON) file or without one."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs):
        """Take the dataclasses in the order in which `parse` returns them; flags cannot be abbreviated."""
        super().__init__(dataclass_types, refuse=leave, **kwargs)
