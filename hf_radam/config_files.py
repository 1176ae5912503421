"""Command lines of dataclass fields, with defaults from a YAML or JSON file.

The text of every value in the file goes through the converter of its flag. So `learning_rate: 1e-3` is a number,
although YAML calls it a string, and `eval_strategy: no` is the word "no".
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


def one_sentence(error: BaseException) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())


def close_matches(name: str, known: Sequence[str]) -> str:
    """Return a question that names the known words closest to `name`."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else "--help lists the known ones"


class ConfigArgumentParser(HfArgumentParser):
    """`HfArgumentParser` whose first positional argument may be a file; flags on the command line win over it.

    `refuse` ends the process with a sentence, and is called for all wrong input. With `allow_other_keys` the file may
    have further keys, which `other_keys` then lists, unless they look like misspelt fields.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        *,
        refuse: Callable[[str], NoReturn],
        allow_other_keys: bool = False,
        **kwargs: Any,
    ):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self.other_keys: list[str] = []
        self._refuse, self._allow_other_keys, self._source = refuse, allow_other_keys, ""
        self._hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self._flags = {
            action.dest: action
            for action in self._actions
            if action.option_strings and not isinstance(action, argparse._StoreFalseAction | argparse._HelpAction)
        }

    def error(self, message: str) -> NoReturn:
        """Refuse with one sentence (`argparse` prints the usage of some 150 flags first)."""
        self._refuse(f"{self._source}{' '.join(message.split())}")

    def parse(self, argv: Sequence[str] | None = None, **instead: Any) -> tuple[Any, ...]:
        """Return one instance of each dataclass, from `[FILE] [--flag value ...]`; fields in `instead` win over it."""
        argv = list(sys.argv[1:] if argv is None else argv)
        tokens = self._file_tokens(argv.pop(0)) if argv and not argv[0].startswith("-") else []
        if tokens and argv and not argv[0].startswith("-"):  # it would join the last list of the file
            self.error(f"unexpected argument {argv[0]!r}: values follow their --flags")
        namespace, rest = self.parse_known_args(tokens + argv)
        if rest and not rest[0].startswith("-"):
            self.error(f"unexpected argument {rest[0]!r}: a YAML file comes first, other values follow their --flags")
        if rest:
            name = rest[0].split("=")[0]
            self.error(f"unknown flag {name}: {close_matches(name, [*self._option_string_actions])}")
        values = vars(namespace) | instead
        made = []
        try:
            for kind in self.dataclass_types:
                made.append(kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}))
            return tuple(made)
        except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
            self.error(one_sentence(error))

    def _file_tokens(self, path: str) -> list[str]:
        """Return a file as flags; values that no flag can spell become defaults."""
        if not path.endswith((".yaml", ".yml", ".json")):
            self.error(f"{path!r} is not a .yaml, .yml or .json file: such a file comes first, or only --flags")
        self._source = f"{path}: "
        tokens: list[str] = []
        for key, text, value in self._entries(path):
            if key not in self._flags:
                known = [*self._flags]
                misspelt = difflib.get_close_matches(str(key), known, cutoff=0.85)
                if misspelt or not self._allow_other_keys:
                    self.error(f"unknown key {key!r}: {close_matches(str(key), known)}")
                self.other_keys.append(str(key))
            elif value is not None:  # null asks for the default
                tokens += self._tokens(key, text, value)
        self.parse_known_args(tokens)  # so that an error in the file comes with its name
        self._source = ""
        return tokens

    def _entries(self, path: str) -> list[tuple[Any, Any, Any]]:
        """Read (key, its text or texts, its value), in the order of the file."""
        keys: list[str] = []
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            if path.endswith(".json"):  # YAML would make two characters of an escaped one beyond the BMP
                texts, values = json.loads(text, parse_int=str, parse_float=str), json.loads(text)
                pairs = json.loads(text, object_pairs_hook=list)
                keys = [pair[0] for pair in pairs] if isinstance(values, dict) else []
            else:
                texts, values, node = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text), yaml.compose(text)
                keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        except OSError as error:
            self.error(f"cannot be read: {error.strerror}")
        except (yaml.YAMLError, ValueError) as error:
            self.error(f"is not valid {'JSON' if path.endswith('.json') else 'YAML'}: {error}")
        if not isinstance(values, dict):
            self.error("holds no settings: write one `name: value` a line")
        for key in keys:
            if keys.count(key) > 1:
                self.error(f"key {key!r} is given {keys.count(key)} times: keep one of them")
        return list(zip(texts, texts.values(), values.values(), strict=True))

    def _tokens(self, key: str, text: Any, value: Any) -> list[str]:
        """Return one value of the file as a flag."""
        action = self._flags[key]
        if isinstance(value, bool) and bool in _members(self._hints[key]):
            return [f"--{key}={value}"]
        if not isinstance(value, list | dict):
            return [f"--{key}={text}"]
        if isinstance(value, list) and action.nargs == "+" and all(isinstance(word, str) for word in text):
            if not text:
                self.error(f"{key} is an empty list: give it a value, or leave the key out")
            return [f"--{key}", *text]
        if not any(isinstance(value, getattr(m, "__origin__", m)) for m in _members(self._hints[key])):
            kind = "list" if isinstance(value, list) else "mapping"
            self.error(f"{key} takes one value, not the {kind} {value!r}")
        self.set_defaults(**{key: value})  # the field takes it, but no flag can spell it
        return []


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the classes of a type hint, without those inside `list[...]` and `dict[...]`."""
    is_class = isinstance(hint, type) or hasattr(hint, "__origin__") and isinstance(hint.__origin__, type)
    members = (hint,) if is_class else tuple(m for arg in get_args(hint) for m in _members(arg))
    return tuple(m for m in members if isinstance(getattr(m, "__origin__", m), type))
