"""Write docs/flags.md from the fields of `RAdamTrainingArguments`: `make flags`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import TrainingArguments

from hf_radam import RAdamTrainingArguments

CHANGED = ("optim", "lr_scheduler_type")
"""Fields of transformers that take more values here."""
TEXT = """# Flags

The fields of `RAdamTrainingArguments` beyond those of `TrainingArguments`, which all keep working. `examples/run_clm.py`
takes them as flags, after a YAML or JSON file with the same names or without one; `--help` lists its flags for model and
data, too. A wrong name or value is an error that says what to do, with exit code 2.

{table}
This page is written by `make flags`.
"""


def flags_page() -> str:
    """Return the page: the new or changed fields with their defaults and help texts."""
    upstream = TrainingArguments.__dataclass_fields__
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(RAdamTrainingArguments):
        if field.init and (field.name not in upstream or field.name in CHANGED):
            default = "" if field.default is None else f"`{getattr(field.default, 'value', field.default)}`"
            rows.append(f"| `--{field.name}` | {default} | {field.metadata['help']} |")
    return TEXT.format(table="\n".join(rows) + "\n")


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(flags_page(), encoding="utf-8")
