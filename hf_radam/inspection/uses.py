"""What a checkpoint can be resumed, extended or evaluated with, as the command to type, or why it cannot."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from hf_radam.checkpoints.layouts import DEEPSPEED, has_optimizer, layout_of, missing_state
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.runs import list_checkpoints, run_of
from hf_radam.checkpoints.sharded import is_sharded_alone
from hf_radam.checkpoints.verify import evaluation_folder
from hf_radam.describe import decay_at
from hf_radam.inspection.facts import NOT_RESUMABLE, WHOLE, CheckpointFacts, X, Y
from hf_radam.inspection.phases import CONSTANT, FINISHED


@dataclass(frozen=True)
class Use:
    """One thing to do with a checkpoint: whether it can be done, and the words for it."""

    possible: bool
    words: str


def uses(facts: CheckpointFacts) -> dict[str, Use]:
    """What can be done with a checkpoint: `resume`, `extend`, `evaluate`."""
    return {"resume": _resume(facts), "extend": _extend(facts), "evaluate": _evaluate(facts)}


def _unfit(facts: CheckpointFacts) -> str | None:
    """Why no training can go on from a checkpoint, if so."""
    if facts.state == WHOLE:
        return None
    if facts.state != NOT_RESUMABLE:
        return f"no: {facts.state} ({', '.join(facts.problems)})"
    return (
        f"no: without {' and '.join(missing_state(facts.path))} (save_only_model?) training cannot go on; to start a "
        "new run from its weights, load them as the model"
    )


def _resume(facts: CheckpointFacts) -> Use:
    unfit = _unfit(facts)
    if unfit is not None:
        return Use(False, unfit)
    if facts.phase == FINISHED:
        return Use(False, f"no: the run has had its {facts.max_steps} updates, there is nothing left to train")
    words = f"--resume_from_checkpoint {shlex.quote(facts.path)}, with the flags the run was started with"
    if layout_of(facts.path) is DEEPSPEED:
        words += f", under DeepSpeed with the same stage and number of processes ({facts.processes})"
    if facts.ours:
        return Use(True, words)
    optim = facts.optim or ""
    if optim.startswith("schedule_free_") and optim != "schedule_free_radam":
        return Use(True, f"{words}, with stock Trainer ({optim} is not one of ours)")
    if facts.root in (Y, X):
        words += "; in RAdamTrainer with --optim radam_schedulefree, which takes the optimizer's state over"
        if facts.lr_scheduler_type not in (None, *CONSTANT):
            words += f", and refuses the schedule ({facts.lr_scheduler_type}): schedule-free wants a constant one"
    return Use(True, words)


def can_begin_extension(facts: CheckpointFacts) -> bool:
    """Whether a run can be extended from just this checkpoint, as far as its own schedule has a say."""
    if facts.state != WHOLE or facts.schedule_step is None:
        return False
    if facts.schedule is None:
        return facts.lr_scheduler_type in CONSTANT
    return decay_at(facts.schedule, facts.schedule_step) is None


def _latest_source(run: Path) -> Path | None:
    """The checkpoint that extending a run would begin with, if it is whole: its checksums are not looked at here."""
    for place in list_checkpoints(run):
        with suppress(CheckpointError, KeyError, TypeError, ValueError, AttributeError):
            manifest = read_manifest(place.path)
            if manifest and manifest["schedule"] and has_optimizer(place.path):
                if decay_at(manifest["schedule"], manifest["schedule_step"]) is None:
                    return place.path
    return None


def new_total(facts: CheckpointFacts) -> str:
    """What the N in `--max_steps N` of an extension must be."""
    if facts.schedule is not None and "total_steps" in facts.schedule:
        return f"N: the new total, above {facts.schedule['total_steps']}"
    return f"N: the new total, above {facts.schedule_step}"


def _extend(facts: CheckpointFacts) -> Use:
    unfit = _unfit(facts)
    if unfit is not None:
        return Use(False, unfit)
    if can_begin_extension(facts):
        at_budget = facts.schedule is not None and facts.schedule_step in facts.schedule.get("budgets", ())
        back = "; the learning rate goes back to the peak here, as WSD-S has it" if at_budget else ""
        return Use(True, f"--extend_from {shlex.quote(facts.path)} --max_steps N ({new_total(facts)}){back}")
    if facts.schedule is None:
        name = facts.lr_scheduler_type or "a schedule that is not known"
        return Use(False, f"no: {name} would have had another past in a longer run")
    run = run_of(Path(facts.path))
    rate = f"{facts.learning_rates[0]:g}" if facts.learning_rates else "the floor"
    jump = f"not from here: the schedule of a longer run would jump from {rate} back to the peak"
    source = _latest_source(run)
    if source is None:
        return Use(False, f"{jump}, and {run} has no checkpoint from before the decay")
    goes_on = f"--extend_from {shlex.quote(str(run))} --max_steps N ({new_total(facts)}) goes on from {source}"
    return Use(False, f"{jump}. {goes_on}")


def _names_its_base(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _evaluate(facts: CheckpointFacts) -> Use:
    try:
        folder = evaluation_folder(facts.path)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Use(False, f"no: {error}")
    if not any((folder / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return Use(
            False, f"no {CONFIG_NAME}: the model is no PreTrainedModel; safetensors reads the weights in {folder}"
        )
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not _names_its_base(folder):
        return Use(True, f'peft.PeftModel.from_pretrained(base, "{folder}"): the adapter does not say what its base is')
    words = f'load_evaluation_model("{facts.path}")'
    if not facts.ours and facts.root == Y:
        return Use(True, f"{words} loads y: no file holds x. RAdamTrainer, resumed from it, evaluates and saves x")
    if not facts.ours and facts.root == X:
        return Use(True, f"{words} loads x")
    what = facts.evaluation_folder + "/" if facts.evaluation_folder else "the root"
    if is_sharded_alone(folder):
        what += f", in shards; for from_pretrained: hf-radam consolidate {shlex.quote(facts.path)}"
    return Use(True, f"{words} loads {what}")
