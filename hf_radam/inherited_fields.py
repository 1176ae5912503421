"""Defaults of a dataclass with several bases: those that a plain class would have.

A field that several bases have is, to `dataclasses`, that of the first of them, and a base has every field that it
inherits. Of `(RAdamTrainingArguments, SFTConfig)` the learning rate would be that of `TrainingArguments`, although
`SFTConfig` has another; in the other order the schedule would be, although `RAdamTrainingArguments` has another.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, ForwardRef

OPTIONS = ("default", "default_factory", "init", "repr", "hash", "compare", "metadata", "kw_only")


def keep_declared_fields(cls: type) -> None:
    """Declare in a class that `@dataclass` is about to see every field that it would take from the wrong base."""
    for name, (base, declared) in _declared_fields(cls).items():
        # A type in quotes is looked up where it was written.
        quoted = isinstance(declared.type, str)
        cls.__annotations__[name] = ForwardRef(str(declared.type), module=base.__module__) if quoted else declared.type
        setattr(cls, name, dataclasses.field(**{option: getattr(declared, option) for option in OPTIONS}))


def check_decorated(cls: type) -> None:
    """Make sure that a class with fields of several bases is a dataclass itself.

    Raises:
        TypeError: if it is none: its values would be those of the first base.
    """
    if "__dataclass_fields__" not in vars(cls) and _declared_fields(cls, own=frozenset()):
        raise TypeError(f"{cls.__name__} has fields of several dataclasses: write @dataclass above it.")


def _declared_fields(cls: type, own: Collection[str] | None = None) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """Fields that a base declares, with that base, and that would be taken from another, which only inherits them."""
    bases = [base for base in cls.__mro__[1:] if "__dataclass_fields__" in vars(base)]
    fields = {base: vars(base)["__dataclass_fields__"] for base in bases}
    declared: dict[str, tuple[type, dataclasses.Field[Any]]] = {}
    for base in bases:
        inherited = [fields[further] for further in base.__mro__[1:] if further in fields]
        for name, one in fields[base].items():
            if name not in declared and not any(one is of_base.get(name) for of_base in inherited):
                declared[name] = base, one  # a field that is inherited is the same object
    taken = {name: one for base in reversed(bases) for name, one in fields[base].items()}
    own = cls.__annotations__ if own is None else own
    return {name: found for name, found in declared.items() if found[1] is not taken[name] and name not in own}
