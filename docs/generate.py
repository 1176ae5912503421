"""Write docs/flags.md, and the drawing of the modules in docs/development.md: `make docs`."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from transformers import TrainingArguments

import hf_radam
from hf_radam import RAdamTrainingArguments

DOCS = Path(__file__).parent
CHANGED = {"optim": "that of `transformers`", "lr_scheduler_type": "`auto`"}
"""Fields of transformers that take more values here, and their defaults."""
FLAGS = """# Flags

The fields that `RAdamTrainingArguments` adds to `TrainingArguments`. `examples/run_clm.py` takes all of them as flags,
after a YAML or JSON file with the same names, or without one. Its `--help` lists the flags for model and data, too.

{table}"""
RANKS = (
    ("cli",),
    ("trainer",),
    ("training_args", "names", "checkpoints"),
    ("averaging", "optim", "batch_norm"),
    ("sharding",),
    ("schedules", "config_files", "random_state"),
)
"""Modules and folders of the package from the top to the bottom, as in tests/test_layering.py."""
DRAWING = re.compile(r"(?<=```text\n)6  cli.*?(?=```)", re.DOTALL)


def flags_page() -> str:
    """Return the page: the new or changed fields with their defaults and help texts."""
    upstream = TrainingArguments.__dataclass_fields__
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(RAdamTrainingArguments):
        if field.init and (field.name not in upstream or field.name in CHANGED):
            default = "" if field.default is None else f"`{field.default}`"
            rows.append(f"| `--{field.name}` | {CHANGED.get(field.name, default)} | {field.metadata['help']} |")
    return FLAGS.format(table="\n".join(rows) + "\n")


def imports() -> dict[str, set[str]]:
    """Return, for each module and folder of the package, which of the others it imports."""
    package = Path(str(hf_radam.__file__)).parent
    found: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        names: list[str] = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
        found.setdefault(own, set()).update(name.split(".")[1] for name in names if name.startswith("hf_radam."))
    del found["__init__"]
    return {own: {name for name in names if name in found and name != own} for own, names in found.items()}


def drawing() -> str:
    """Draw the ranks from the top to the bottom, with what each module imports."""
    graph = imports()
    assert sorted(graph) == sorted(name for names in RANKS for name in names), "RANKS is not complete"
    lines = []
    for number, names in zip(range(len(RANKS), 0, -1), RANKS, strict=True):
        for name in names:
            rank = str(number) if name == names[0] else " "
            imported = " ".join(other for others in RANKS for other in others if other in graph[name])
            lines.append(f"{rank}  {name} {'.' * (16 - len(name))} {imported}".rstrip(". "))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (DOCS / "flags.md").write_text(flags_page(), encoding="utf-8")
    development = DOCS / "development.md"
    text = development.read_text(encoding="utf-8")
    development.write_text(DRAWING.sub(drawing(), text), encoding="utf-8")
