"""Command lines of dataclass fields, with a YAML or JSON file under the flags.

The text of every value in the file goes through the same converter as the text of the flag with that name. So
`learning_rate: 1e-3` is a number although YAML itself calls it a string, `eval_strategy: no` is the word "no", and
`max_steps: many` is refused in the same words as `--max_steps many`.
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

YAML_SUFFIXES, JSON_SUFFIX = (".yaml", ".yml"), ".json"
MISSPELT = 0.85
"""A name that is this similar to a known one (`difflib`, 1 for equal) is taken for that one, misspelt."""


def one_sentence(error: BaseException) -> str:
    """Put the message of an error on one line."""
    return " ".join(str(error).split())


def close_matches(name: str, known: Sequence[str]) -> str:
    """Name the known words closest to `name`, as the end of a sentence."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else "--help lists the known ones"


class ConfigArgumentParser(HfArgumentParser):
    """`HfArgumentParser` whose first positional argument may be a file; flags on the command line win over it.

    Args:
        dataclass_types: the dataclasses, in the order in which `parse` returns them.
        refuse: ends the process with a sentence; everything wrong ends there.
        passes_over: whether the file may also speak of what is none of these dataclasses' business; `passed_over` then
            lists those keys. A misspelt key is refused all the same.
        **kwargs: as for `HfArgumentParser`.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type],
        *,
        refuse: Callable[[str], NoReturn],
        passes_over: bool = False,
        **kwargs: Any,
    ):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self.passed_over: list[str] = []
        self._refuses, self._passes_over, self._source = refuse, passes_over, ""
        self._hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self._flags = {
            action.dest: action
            for action in self._actions
            if action.option_strings and not isinstance(action, argparse._StoreFalseAction | argparse._HelpAction)
        }

    def error(self, message: str) -> NoReturn:
        """Refuse with one sentence (upstream prints the usage of some 150 flags first)."""
        self._refuses(f"{self._source}{' '.join(message.split())}")

    def parse(self, argv: Sequence[str] | None = None, **instead: Any) -> tuple[Any, ...]:
        """One instance of each dataclass, from `[FILE] [--flag value ...]`.

        Anything wrong, also what the dataclasses themselves refuse, ends in one sentence.

        Args:
            argv: the command line; that of the process when not given.
            **instead: values that fields have whatever the command line says.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        tokens = self._file_tokens(argv.pop(0)) if argv and not argv[0].startswith("-") else []
        namespace, rest = self.parse_known_args(tokens + argv)
        if rest:
            self._refuse(rest[0])
        values = vars(namespace) | instead
        try:
            return tuple(
                kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init})
                for kind in self.dataclass_types
            )
        except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
            self.error(one_sentence(error))

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}: a YAML file comes first, every other value follows its --flag")
        name = word.split("=")[0]
        self.error(f"unknown flag {name}: {close_matches(name, [*self._option_string_actions])}")

    def _file_tokens(self, path: str) -> list[str]:
        """Turn a file into the flags that say the same; values no flag can spell become defaults."""
        if not path.endswith((*YAML_SUFFIXES, JSON_SUFFIX)):
            self.error(f"{path!r} is not a .yaml, .yml or .json file: such a file comes first, or only --flags")
        self._source = f"{path}: "
        tokens: list[str] = []
        for key, text, value in self._entries(path):
            if key not in self._flags:
                known = [*self._flags]
                if not self._passes_over or difflib.get_close_matches(str(key), known, cutoff=MISSPELT):
                    self.error(f"unknown key {key!r}: {close_matches(str(key), known)}")
                self.passed_over.append(str(key))
            elif value is not None:  # null asks for the default
                tokens += self._tokens(key, text, value)
        self.parse_known_args(tokens)  # so that an error in the file is told with the name of the file
        self._source = ""
        return tokens

    def _entries(self, path: str) -> list[tuple[Any, Any, Any]]:
        """Read (key, its text or texts as written, its value as YAML understands it) in the order of the file."""
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            if path.endswith(JSON_SUFFIX):
                json.loads(text)
                text = text.replace("\t", " ")  # in JSON a tab is never in a word; YAML does not indent with it
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                self.error("holds no settings: write one `name: value` a line")
            entries = [(key.value, _text(item), loader.construct_object(item, deep=True)) for key, item in node.value]
        except OSError as error:
            self.error(f"cannot be read: {error.strerror}")
        except json.JSONDecodeError as error:
            self.error(f"is not valid JSON: {error}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"is not valid YAML: {error}")
        keys = [key for key, _, _ in entries]
        for key in keys:
            if keys.count(key) > 1:
                self.error(f"key {key!r} stands there {keys.count(key)} times: keep one of them")
        return entries

    def _tokens(self, key: str, text: Any, value: Any) -> list[str]:
        """Spell one value of the file as a flag."""
        action = self._flags[key]
        if isinstance(value, bool) and _is_boolean(self._hints[key]):
            return [f"--{key}={value}"]
        if not isinstance(value, list | dict):
            return [f"--{key}={text}"]
        if isinstance(value, list) and action.nargs == "+" and all(isinstance(word, str) for word in text):
            if not text:
                self.error(f"{key} is an empty list: give it a value, or leave the key out")
            return [f"--{key}", *text]
        if isinstance(value, dict) and str in _members(self._hints[key]):
            return [f"--{key}={json.dumps(value)}"]
        if not any(isinstance(value, getattr(m, "__origin__", m)) for m in _members(self._hints[key])):
            kind = "list" if isinstance(value, list) else "mapping"
            self.error(f"{key} takes one value, not the {kind} {value!r}")
        self.set_defaults(**{key: value})  # the field takes it, but no flag can spell it
        return []


def _text(node: yaml.Node) -> Any:
    """Give a scalar's text as written and a sequence's texts; a mapping has none."""
    if isinstance(node, yaml.SequenceNode):
        return [_text(item) for item in node.value]
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _members(hint: Any) -> tuple[Any, ...]:
    """List the classes that a type hint admits, those inside `list[...]` and `dict[...]` left out."""
    is_class = isinstance(hint, type) or hasattr(hint, "__origin__") and isinstance(hint.__origin__, type)
    members = (hint,) if is_class else tuple(m for arg in get_args(hint) for m in _members(arg))
    return tuple(m for m in members if isinstance(getattr(m, "__origin__", m), type))


def _is_boolean(hint: Any) -> bool:
    return bool in _members(hint)
