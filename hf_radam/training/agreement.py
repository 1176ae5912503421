"""Refuse processes of one run that were started with different flags, models or data: they would wait for each other.

Every process describes what it is about to train as names and values in words. The descriptions are compared by their
checksum; only where those differ are they gathered, so that the error can name what differs.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import accelerate
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.trainer_utils import has_length

from hf_radam import __version__
from hf_radam.sharding.base import all_gather_object, world_size

MAY_DIFFER = frozenset(
    # which process it is; what it shows, and to whom
    "local_rank log_level log_level_replica disable_tqdm report_to run_name project hub_token "
    # how fast its machine reads, with the same samples in the same order
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context".split()
)
"""Arguments that each process may have its own value of."""
MOST_NAMED = 10
"""Differences that the error names; a model of another shape has hundreds."""


class DisagreementError(ValueError):
    """Processes of one run that were started differently; every one of them raises it."""


def check_agreement(trainer: Any, **further: Any) -> None:
    """Raise on every process if they are not about to do the same; all of them must call this.

    Args:
        trainer: any `Trainer` that is about to train.
        **further: more that must be the same, by name.

    Raises:
        ValueError: naming what differs (arguments, functions, the model's parameters, lengths of the data, versions),
            with its values and the ranks that have them. It is the same error on every rank.
    """
    if world_size() > 1:
        check_same(described(trainer) | dict(_flat("", further)))


def check_same(facts: Mapping[str, str]) -> None:
    """Raise the same `ValueError` on every process of the group if they have different facts.

    It waits for the others as long as the group does for anything (`ddp_timeout`).
    """
    checksum = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(all_gather_object(checksum))) > 1:
        raise DisagreementError(
            "The processes of this run do not agree on what to train, and would wait for each other or train different "
            f"things: {'; '.join(differences(all_gather_object(dict(facts))))}. Start every process with the same flags, "
            "model and data."
        )


def differences(by_rank: list[dict[str, str]]) -> list[str]:
    """One phrase for each fact that is not the same on every rank: its name, its values and who has them."""
    names = [name for name in dict.fromkeys(name for facts in by_rank for name in facts)]
    found = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(by_rank):
            ranks.setdefault(facts.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            found.append(f"{name}: {', '.join(f'{value} on {_ranks(which)}' for value, which in ranks.items())}")
    more = [f"and {len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else []
    return found[:MOST_NAMED] + more


def described(trainer: Any) -> dict[str, str]:
    """What a trainer is about to train, as names and values in words."""
    args = trainer.args
    fields = [field.name for field in dataclasses.fields(args) if not field.name.startswith("_")]
    given = {name: getattr(args, name) for name in fields if name not in MAY_DIFFER}
    functions = ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "data_collator")
    given |= {name: getattr(trainer, name) for name in functions}
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    bare = isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, AcceleratedOptimizer)
    given |= {
        "optimizer": {"class": type(optimizer)} | optimizer.defaults if bare else type(optimizer),
        "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
        "lr_scheduler": type(schedule),
        "length of train_dataset": _length(trainer.train_dataset),
        "length of eval_dataset": _length(trainer.eval_dataset),
        "FSDP": _plugin(trainer) if trainer.is_fsdp_enabled else False,
        "DeepSpeed": trainer.accelerator.state.deepspeed_plugin.deepspeed_config if trainer.is_deepspeed_enabled else 0,
        "version": {"hf_radam": __version__}
        | {package.__name__: package.__version__ for package in (torch, transformers, accelerate)},
    }
    return dict(_flat("", given)) | parameters(trainer.model)


def parameters(model: nn.Module) -> dict[str, str]:
    """Shape and dtype of every parameter of a model, and whether it trains; the whole shape where it is sharded."""
    return {
        # DeepSpeed leaves an empty tensor in the place of a parameter that it has partitioned.
        f"parameter {name}": f"{tuple(getattr(parameter, 'ds_shape', parameter.shape))} {_word(parameter.dtype)}"
        f"{'' if parameter.requires_grad else ', frozen'}"
        for name, parameter in model.named_parameters()
    }


def _ranks(ranks: list[int]) -> str:
    """The ranks, consecutive ones as a range."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join('-'.join(map(str, span)) for span in spans)}"


def _plugin(trainer: Any) -> dict[str, Any]:
    plugin = trainer.accelerator.state.fsdp_plugin
    return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin)}


def _length(data: Any) -> Any:
    """Samples in a data set, or in each of several."""
    if isinstance(data, Mapping):
        return {name: _length(one) for name, one in data.items()}
    if data is None:
        return None
    return len(data) if has_length(data) else "unknown"


def _flat(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Names and words of nested mappings, `a.b.c` for what lies deeper."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", _word(value)


def _word(value: Any) -> str:
    """A value in words that are the same in every process: without addresses in memory."""
    if isinstance(value, functools.partial):
        return f"partial({_word(value.func)}, {_word(value.args)}, {_word(value.keywords)})"
    if isinstance(value, enum.Enum):
        return _word(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_word(k)}: {_word(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_word, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"[{', '.join(sorted(map(_word, value)))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{_word(type(value))}({_word({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})})"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
