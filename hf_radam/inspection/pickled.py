"""Read the plain attributes of a pickled object without unpickling it.

`training_args.bin` is a pickle of a whole object, which to load is to run code. Its instructions are followed here on a
stack where every class and every object is an inert stand-in: nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

LARGEST_PICKLE = 2**20  # bytes; the arguments take a few thousand
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
FROM_THE_MARK = ("TUPLE", "LIST", "DICT", "SETITEMS", "APPENDS", "ADDITEMS", "FROZENSET", "POP_MARK")
TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "STACK_GLOBAL": 2}
TAKES |= {"BUILD": 1, "SETITEM": 2, "APPEND": 1, "POP": 1, "BINPERSID": 1}


class Opaque:
    """Stands for a class, or for an object that is not a plain value."""


class _Mark:
    """Where a collection begins on the stack."""


def pickled_attributes(file: Path) -> dict[str, Any]:
    """The attributes of the object that `torch.save` wrote: strings, numbers, booleans, None; others are `Opaque`.

    A class applied to one string, as an enum of strings is pickled, counts as that string. Empty for a file that
    cannot be read, or that is longer than any arguments are.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (member,) = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
            return {} if member.file_size > LARGEST_PICKLE else _attributes(archive.read(member))
    except Exception:  # a damaged archive or pickle fails in any way; what other files say is still told
        return {}


def _attributes(pickled: bytes) -> dict[str, Any]:
    """The state that the last `BUILD` gives, which is that of the outermost object."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    state: Any = {}
    for code, argument, _ in pickletools.genops(pickled):
        name = code.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in FROM_THE_MARK:
            begin = len(stack) - 1 - stack[::-1].index(_Mark)
            items, stack[begin:] = stack[begin + 1 :], []
            _combine(name, items, stack)
        elif name in TAKES:
            items, stack[-TAKES[name] :] = stack[-TAKES[name] :], []
            state = items[0] if name == "BUILD" else state
            _combine(name, items, stack)
        elif name == "MARK":
            stack.append(_Mark)
        elif name not in ("PROTO", "FRAME", "STOP"):
            stack.append(_pushed(name, argument))
    return state if isinstance(state, dict) else {}


def _pushed(name: str, argument: Any) -> Any:
    if name in CONSTANTS:
        return CONSTANTS[name]
    if name == "EMPTY_DICT":
        return {}
    plain = isinstance(argument, (str, int, float)) and name not in ("GLOBAL", "PERSID")
    return argument if plain else Opaque()


def _combine(name: str, items: list[Any], stack: list[Any]) -> None:
    """Put on the stack what an instruction makes of `items`, or put them into the dict on top of it."""
    if name in ("SETITEM", "SETITEMS"):
        if isinstance(stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            stack[-1].update({key: value for key, value in pairs if isinstance(key, str)})
    elif name == "REDUCE":
        arguments = items[1]
        single = isinstance(arguments, tuple) and len(arguments) == 1 and isinstance(arguments[0], str)
        stack.append(arguments[0] if single else Opaque())
    elif name.startswith("TUPLE"):
        stack.append(tuple(items))
    elif name not in ("BUILD", "APPEND", "APPENDS", "ADDITEMS", "POP", "POP_MARK"):
        stack.append(Opaque())
