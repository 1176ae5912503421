"""Count what the structure of this repository is measured by: `python tests/measures.py` prints the table.

What is counted how:

- An override is a method with one leading underscore that a class of `RAdamTrainer` in this package defines and
  `transformers.Trainer` has, too.
- A private access is a line with an attribute, an import or a `getattr` of a name with one leading underscore that
  nothing in the package defines: so it belongs to another library. `super()._x` in an override is none.
- A word is counted where it stands in the way that the table of words replaces: `WORDS` in prose (comments, docstrings,
  messages, markdown), `NAMES` as a whole identifier.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = {
    "lines of hf_radam, Python and C++": 9_000,
    "files of hf_radam, Python and C++": 55,
    "lines of tests": 12_000,
    "private methods overridden": 6,
    "lines of the longest of them": 12,
    "lines of the README": 150,
    "words of docs": 7_000,
    "modules over 450 lines": 0,
    "functions over 50 lines": 0,
    "files that mention extend_from": 9,
}
WORDS = {
    "update for step": r"\bupdates?\b(?!\(| rule)",
    "gone on from": r"\b(gone|goes|going|go|went) on (from|with)\b",
    "ours": r"\bours\b",
    "what is/what of": r"\b[Ww]hat (is|was|of|has|does)\b",
    "whole": r"\bwhole\b",
    "damage": r"\bdamaged?\b",
    "piece, stretch": r"\b(pieces?|stretch(es)?)\b",
    "mends": r"\b[Mm]ends?\b",
}
NAMES = set(
    "live held piece pieces stretch cut collect of_every_rank agreed damage FindDamage Place Sealing publish recover "
    "say_float32 save_surroundings written_names widened obstacle why_not against make_ready together sharing "
    "before_writing hold_back tell_of_updates speaks leaves_decay"
    "".split()
)


def sources(folder: Path) -> list[Path]:
    """Return the Python and C++ files of a folder."""
    return sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".cpp"))


def lines(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def words(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").split()) for file in files)


def parsed(folder: Path) -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sources(folder) if file.suffix == ".py"}


def overrides() -> dict[str, int]:
    """Return the private methods of upstream's Trainer that ours overrides, and how many lines each has."""
    import inspect

    from transformers import Trainer

    from hf_radam import RAdamTrainer

    return {
        f"{cls.__name__}.{name}": len(inspect.getsourcelines(value)[0])
        for cls in RAdamTrainer.__mro__
        if cls.__module__.startswith("hf_radam")
        for name, value in vars(cls).items()
        if re.match(r"_[a-z]", name) and hasattr(Trainer, name) and inspect.isfunction(value)
    }


def private_accesses(trees: dict[Path, ast.Module]) -> dict[Path, list[int]]:
    """Return the lines that touch private names of other libraries, by file."""
    defined = {name for tree in trees.values() for name in _defined(tree)}
    return {file: found for file, tree in trees.items() if (found := sorted({*_foreign(tree, defined)}))}


def _defined(tree: ast.Module) -> Iterator[str]:
    """Every name that a module gives to something; attributes are given in assignments."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.rpartition(".")[2] if not node.name.startswith("_") else ""


def _foreign(tree: ast.Module, defined: set[str]) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            path = getattr(node, "module", None) or ""
            names = [part for alias in node.names for part in f"{path}.{alias.name}".split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            text = node.args[1]
            is_text = node.func.id in ("getattr", "hasattr", "setattr") and isinstance(text, ast.Constant)
            names = [str(text.value)] if is_text else []
        else:
            continue
        if any(re.match(r"_[a-zA-Z]", name) and name not in defined for name in names):
            yield node.lineno


def imports(trees: dict[Path, ast.Module], package: Path) -> dict[str, set[str]]:
    """Return the modules of a package that each of them imports."""
    named = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in trees}
    named = {name.removesuffix(".__init__"): file for name, file in named.items()}
    found: dict[str, set[str]] = {name: set() for name in named}
    for name, file in named.items():
        for node in ast.walk(trees[file]):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                    base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
                targets = [f"{base}.{alias.name}" for alias in node.names]
                targets = [target if target in named else base for target in targets]
            else:
                continue
            found[name] |= {target for target in targets if target in named and target != name}
    return found


def imported_once(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that exactly one other imports."""
    counts = Counter(target for targets in graph.values() for target in targets)
    return sorted(name for name, count in counts.items() if count == 1)


def long_functions(trees: dict[Path, ast.Module], limit: int = 50) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        f"{file.name}:{node.lineno} {node.name}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (node.end_lineno or node.lineno) - node.lineno + 1 > limit
    ]


def old_words(files: list[Path]) -> Counter:
    """Return how often each word of the table's left column stands in files."""
    found: Counter = Counter()
    for file in files:
        text = file.read_text(encoding="utf-8")
        prose = text
        if file.suffix == ".py":
            tokens = [*tokenize.generate_tokens(io.StringIO(text).readline)]
            found.update(token.string for token in tokens if token.type == tokenize.NAME and token.string in NAMES)
            spoken = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
            prose = "\n".join(token.string for token in tokens if token.type in spoken)
        found.update({name: len(re.findall(pattern, prose)) for name, pattern in WORDS.items()})
    return +found


def measure(root: Path = ROOT) -> tuple[dict[str, int], list[str]]:
    """Return every measure by its name, and lines that tell where they come from."""
    package, trees = root / "hf_radam", parsed(root / "hf_radam")
    readme, docs = root / "README.md", sorted((root / "docs").rglob("*.md"))
    overridden, private = overrides(), private_accesses(trees)
    once, long = imported_once(imports(trees, package)), long_functions(trees)
    large = [file.name for file in sources(package) if lines([file]) > 450]
    mentions = [file for file in sources(package) if "extend_from" in file.read_text(encoding="utf-8")]
    places = {"hf_radam": sources(package), "examples": sources(root / "examples"), "tests": sources(root / "tests")}
    places |= {"benchmarks": sources(root / "benchmarks"), "README and docs": [readme, *docs]}
    old = {place: old_words(files) for place, files in places.items()}
    numbers = {
        "lines of hf_radam, Python and C++": lines(sources(package)),
        "files of hf_radam, Python and C++": len(sources(package)),
        "lines of tests": lines(sources(root / "tests")),
        "private methods overridden": len(overridden),
        "lines of the longest of them": max(overridden.values(), default=0),
        "lines that touch other libraries' private names": sum(map(len, private.values())),
        "files with such lines": len(private),
        "lines of the README": lines([readme]),
        "words of the README": words([readme]),
        "words of docs": words(docs),
        "files that mention extend_from": len(mentions),
        "modules that one other imports": len(once),
        "functions over 50 lines": len(long),
        "modules over 450 lines": len(large),
    }
    numbers |= {f"old words in {place}": sum(found.values()) for place, found in old.items()}
    details = [f"{name}: {length} lines" for name, length in overridden.items()]
    details += [f"{file.relative_to(root)}: private names in lines {found}" for file, found in private.items()]
    details += [f"one other imports {name}" for name in once]
    details += [f"long: {name}" for name in [*long, *large]]
    details += [f"{place}: {dict(found.most_common())}" for place, found in old.items()]
    return numbers, details


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    measured, where = measure()
    for name, value in measured.items():
        limit = f"at most {LIMITS[name]:,}" if name in LIMITS else ""
        print(f"{name:<50}{value:>8,}   {limit}")
    if "-v" in sys.argv:
        print("\n".join(where))
