"""Read what the files of a checkpoint say without running anything in them, however damaged they are.

`torch.load` is only used with `weights_only`, which makes nothing but tensors and plain values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.optimizer_state import read_groups


def json_object(file: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a JSON file, or an empty one and why there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "is missing"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read ({error})"
    return (content, None) if isinstance(content, dict) else ({}, f"holds a {type(content).__name__}, not an object")


def count(content: Mapping[str, Any], key: str) -> int | None:
    """A whole number of 0 or more under `key`, or None where there is something else."""
    value = content.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def load_plain(file: Path) -> tuple[dict[str, Any], str | None]:
    """The dict in a file of `torch.save`, tensors left on the disk, or an empty one and why there is none."""
    if not file.is_file():
        return {}, "is missing"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged pickle raises depends on where the damage is
        return {}, f"cannot be read ({type(error).__name__})"
    return (content, None) if isinstance(content, dict) else ({}, f"holds a {type(content).__name__}, not a dict")


def parameter_groups(checkpoint: Path) -> list[dict[str, Any]]:
    """The parameter groups of a checkpoint's optimizer; none if they cannot be read."""
    try:
        return read_groups(checkpoint)
    except CheckpointError:
        return []


def learning_rates(scheduler_file: Path) -> list[float]:
    """The different learning rates of the next update in a schedule's file; none if it cannot be read."""
    rates = load_plain(scheduler_file)[0].get("_last_lr")
    if not isinstance(rates, list):
        return []
    plain = [rate.item() if isinstance(rate, torch.Tensor) and rate.numel() == 1 else rate for rate in rates]
    finite = [float(r) for r in plain if isinstance(r, (int, float)) and math.isfinite(r)]
    return list(dict.fromkeys(finite))
