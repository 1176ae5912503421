"""Find the tests that start a process: their code, that of their fixtures, or of what they use starts one.

The names in the compiled code are followed through the tests, the examples and the benchmarks, as far as they are names
of functions, classes or modules; nothing is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in ("tests", "examples", "benchmarks")]
STARTERS = {"subprocess", "multiprocessing", "concurrent.futures.process"}  # modules whose use means a process
CALLS = {("os", "fork"), ("limits", "run"), ("processes.harness", "run"), ("processes.harness", "context")}


def launches(functions: list[Any]) -> bool:
    """Return whether one of the functions, or what it calls in the folders, starts a process."""
    seen: set[Any] = set()
    waiting = list(functions)
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        if code is None or code in seen or not _followed(code.co_filename):
            continue
        seen.add(code)
        for found in _mentioned(code, names):
            if found is True:
                return True
            waiting.append(found)
    return False


def _mentioned(code: CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """What a function mentions: True for a start of a process, else functions to look into."""
    for name in _names(code):
        value = names.get(name)
        if isinstance(value, ModuleType):
            if value.__name__ in STARTERS:
                yield True
            for attribute in _names(code):
                if (value.__name__, attribute) in CALLS:
                    yield True
                if _followed(getattr(value, "__file__", None) or ""):
                    yield from _functions(getattr(value, attribute, None))
        else:
            yield from _functions(value)


def _functions(value: Any) -> Iterator[Any]:
    if inspect.isclass(value):
        yield from (member for member in vars(value).values() if inspect.isfunction(member))
    elif callable(value) and (getattr(value, "__module__", None), getattr(value, "__name__", None)) in CALLS:
        yield True
    elif callable(value) and inspect.isfunction(inspect.unwrap(value)):
        yield value


@cache
def _names(code: CodeType) -> frozenset[str]:
    """The names in a function's code and in that of the functions inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*map(_names, inner))


@cache
def _followed(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in FOLDERS)
