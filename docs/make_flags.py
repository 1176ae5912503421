"""Write docs/flags.md from the fields of `RAdamTrainingArguments`: `make flags`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import TrainingArguments

from hf_radam import RAdamTrainingArguments

CHANGED = {"optim": "that of `transformers`", "lr_scheduler_type": "`auto`"}
"""Fields of transformers that take more values here, and their defaults."""
TEXT = """# Flags

The fields that `RAdamTrainingArguments` adds to `TrainingArguments`. `examples/run_clm.py` takes all of them as flags,
after a YAML or JSON file with the same names, or without one. Its `--help` lists the flags for model and data, too.

{table}
This page is written by `make flags`.
"""


def flags_page() -> str:
    """Return the page: the new or changed fields with their defaults and help texts."""
    upstream = TrainingArguments.__dataclass_fields__
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(RAdamTrainingArguments):
        if field.init and (field.name not in upstream or field.name in CHANGED):
            default = "" if field.default is None else f"`{field.default}`"
            rows.append(f"| `--{field.name}` | {CHANGED.get(field.name, default)} | {field.metadata['help']} |")
    return TEXT.format(table="\n".join(rows) + "\n")


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(flags_page(), encoding="utf-8")
