"""What a trainer knows that a model card should say: the facts for `hf_radam.model_card`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_radam import __version__
from hf_radam.averaging import DEFAULT_HALF_LIFE_RATIO
from hf_radam.checkpoints.load import holds_model
from hf_radam.checkpoints.manifest import EVALUATION_FOLDERS, MANIFEST_NAME, read_manifest
from hf_radam.checkpoints.peft import evaluation_subfolder, is_peft
from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.checkpoints.sharded import is_sharded_alone
from hf_radam.model_card import TRAINING, Averaging, Best, Checkpoint, Evaluation, Facts, Loader
from hf_radam.names import SchedulerName
from hf_radam.schedules import describe_schedule
from hf_radam.training.parts import PartsMixin
from hf_radam.training.raw_names import prefixes, raw_twins

NOT_METRICS = ("_runtime", "_per_second", "_model_preparation_time", "_jit_compilation_time")


def facts_of(trainer: PartsMixin) -> Facts:
    """The facts of a trainer, after training or before it. Reads its folder; asks no other process."""
    args, state = trainer.args, trainer.state
    schedule = SchedulerName(args.lr_scheduler_type).value
    total = state.max_steps or args.max_steps
    ours = args.schedule(total, trainer._past) if total > 0 else None
    best = _best(trainer)
    update = best.update if best is not None and best.loaded else None
    model, run = trainer._bare_model, Path(str(args.output_dir))
    loader, evaluation_loader = loaders(model)
    raw_prefixes = prefixes(trainer.eval_dataset) if args.ewa_eval_raw else []
    return Facts(
        version=__version__,
        optimizer=trainer._optimizer_name,
        schedule=schedule,
        schedule_in_words=describe_schedule(ours, name=schedule, total_steps=total if total > 0 else None),
        updates=state.global_step,
        averaging=_averaging(trainer, state.global_step if update is None else update),
        kind=_kind(trainer),
        evaluation=last_evaluation(state.log_history, update=update, raw_prefixes=raw_prefixes),
        best=best,
        repository=trainer.hub_model_id,
        holds_model=holds_model(run),
        loader=loader,
        evaluation_loader=evaluation_loader,
        checkpoint=_checkpoint(trainer, run, model),
    )


def _best(trainer: PartsMixin) -> Best | None:
    state, metric = trainer.state, trainer.args.metric_for_best_model
    if metric is None or state.best_metric is None or state.best_global_step is None:
        return None
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return Best(name, state.best_metric, state.best_global_step, loaded=trainer._best_model_loaded)


def _kind(trainer: PartsMixin) -> str:
    """What the evaluation weights are: of the best ones that were loaded, its checkpoint tells."""
    if not trainer._best_model_loaded:
        return trainer._evaluation.source or TRAINING
    best = trainer.state.best_model_checkpoint
    manifest = None if best is None else read_manifest(best)
    folder = None if manifest is None else manifest["evaluation"]["folder"]
    return TRAINING if folder is None else folder.partition("/")[0]


def _averaging(trainer: PartsMixin, update: int) -> Averaging | None:
    """The window of the average that was evaluated after an update, and its half-life then, as far as it was logged."""
    if not trainer.args.ewa:
        return None
    args, average = trainer.args, trainer.average
    history = trainer.state.log_history
    known = [(r["ewa_half_life"], r["step"]) for r in history if "ewa_half_life" in r and r["step"] <= update]
    if average is not None and average.started:
        known.append((average.half_life, update))
    half_life, at = known[-1] if known else (None, update)
    return Averaging(
        decay=args.ewa_decay,
        half_life_ratio=args.ewa_half_life_ratio or DEFAULT_HALF_LIFE_RATIO,
        every=args.ewa_every,
        start_step=args.ewa_start_step,
        half_life=half_life,
        update=int(at),
    )


def _checkpoint(trainer: PartsMixin, run: Path, model: Any) -> Checkpoint | None:
    ours = [place.path for place in list_checkpoints(run) if (place.path / MANIFEST_NAME).is_file()]
    loaded = trainer.state.best_model_checkpoint if trainer._best_model_loaded else None
    best = [place for place in ours if loaded is not None and place.resolve() == Path(loaded).resolve()]
    place = next(iter([*best, *ours]), None)
    if place is None:
        return None
    folders = {TRAINING: place} | {kind: place / evaluation_subfolder(kind, model) for kind in EVALUATION_FOLDERS}
    there = {kind: folder.relative_to(run).as_posix() for kind, folder in folders.items() if folder.is_dir()}
    return Checkpoint(there[TRAINING], there, sharded=is_sharded_alone(place), best=bool(best))


# ---- Evaluation ----


def last_evaluation(
    history: Sequence[Mapping[str, Any]], *, update: int | None, raw_prefixes: Sequence[str]
) -> Evaluation | None:
    """What a trainer's history says of its last evaluation.

    Args:
        history: the records, each with its `step`.
        update: after which the weights were those to speak of. Later records of that update may be of other weights, so
            the first of each metric counts. None: the last evaluation, of which the last of each metric counts.
        raw_prefixes: prefixes of the evaluations in which the training weights were evaluated, too.
    """
    records = [(record["step"], metrics) for record in history if (metrics := _metrics(record))]
    if not records:
        return None
    at = records[-1][0] if update is None else update
    found: dict[str, float] = {}
    raw: dict[str, float] = {}
    for step, metrics in records if update is None else reversed(records):
        if step == at:
            twins = raw_twins(metrics, raw_prefixes)
            collected = _collected(metrics, twins, raw_prefixes)
            found |= {collected.get(name, name): value for name, value in metrics.items() if name not in twins}
            raw |= {twin: metrics[name] for name, twin in twins.items()}
    return Evaluation(at, found, raw) if found else None


def _collected(metrics: Mapping[str, float], twins: Mapping[str, str], raw_prefixes: Sequence[str]) -> dict[str, str]:
    """Metrics that TRL names without the data set that they are of, with the names of the others of that data set.

    Each record is of one data set: `eval_entropy` beside `eval_a_raw_entropy` is that of `a`.
    """
    names = {}
    for twin in twins.values():
        if twin not in metrics:
            short = next(twin.removeprefix(f"{prefix}_") for prefix in raw_prefixes if twin.startswith(f"{prefix}_"))
            names[f"eval_{short}"] = twin
    return names


def told_of_best(history: Sequence[dict[str, Any]], update: int) -> list[dict[str, Any]]:
    """A history in which upstream's summary, which tells the last evaluation, finds the one after an update instead."""
    best = next((record for record in history if record["step"] == update and "eval_loss" in record), None)
    return [*history, *([] if best is None else [best])]


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if name.startswith("eval_") and not name.endswith(NOT_METRICS) and isinstance(value, int | float)
    }


# ---- Loading ----


def loaders(model: Any) -> tuple[Loader | None, Loader]:
    """How the model folders of a run are loaded, and the evaluation weights of its checkpoints.

    Of an adapter that does not name its base model there is no way for the first. A class of the training script cannot
    be imported elsewhere, which a comment says.
    """
    ours = "from hf_radam import load_evaluation_model"
    if is_peft(model):
        names_base = bool(model.peft_config[model.active_adapter].base_model_name_or_path)
        imports, name, _ = _class_of(model.get_base_model())
        preamble = (
            f"from peft import PeftConfig, PeftModel\n{imports}\n\n\n"
            "def load(folder):\n"
            f"    base = {name}.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path)\n"
            "    return PeftModel.from_pretrained(base, folder)\n\n"
        )
        return Loader(preamble, "load({})") if names_base else None, Loader(ours, "load_evaluation_model({})")
    imports, name, known = _class_of(model)
    plain = Loader(imports, f"{name}.from_pretrained({{}})")
    if known:
        return plain, Loader(ours, "load_evaluation_model({})")
    return plain, Loader(f"{ours}\n{imports}", f"load_evaluation_model({{}}, model_class={name})")


def _class_of(model: Any) -> tuple[str, str, bool]:
    """Import and name of the class that loads a model, and whether transformers has it."""
    own = type(model)
    unwrapped = own.__name__.removeprefix("FSDP")  # which FSDP2 puts before it
    own = next((kind for kind in own.__mro__ if kind.__name__ == unwrapped), own)
    name = own.__name__
    if getattr(transformers, name, None) is own:
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type) == name:
            name = "AutoModelForCausalLM"
        return f"from transformers import {name}", name, True
    if own.__module__ == "__main__":
        return f"# {name} is a class of the training script: define it here first.", name, False
    return f"from {own.__module__} import {name}", name, False
