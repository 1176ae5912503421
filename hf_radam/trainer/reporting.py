"""Report a run: the section of its model card, uploads to the Hub, and the model that loggers upload at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
import yaml
from huggingface_hub import HfApi, ModelCard
from transformers.integrations.integration_utils import DVCLiveCallback, WandbCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from hf_radam import __version__
from hf_radam.averaging import DEFAULT_HALF_LIFE_RATIO
from hf_radam.checkpoints.manifest import read_manifest
from hf_radam.checkpoints.peft import is_peft
from hf_radam.checkpoints.runs import PREFIX
from hf_radam.names import SchedulerName
from hf_radam.schedules import describe_schedule
from hf_radam.trainer.compatibility import is_sharded_in_forward, optimizer_name
from hf_radam.trainer.evaluation import metric_prefixes, raw_twins

logger = logging.get_logger(__name__)

BEGIN, END = "<!-- hf_radam -->\n", "<!-- hf_radam: end -->\n"
"""Invisible lines around the section, by which it is found again."""
HEADINGS = ("\n## Model description\n", "\n## Training procedure\n")
"""Headings of upstream and of TRL, before the first of which the section stands."""
TAG = "hf_radam"
TAGS = {"radam": "radam", "radam_schedulefree": "schedule-free", "wsd": "wsd", "wsd_s": "wsd-s", "ewa": "ewa"}
WEIGHTS = {
    None: "the weights as the optimizer left them",
    "ewa": "an exponential moving average of the weights (EWA)",
    "schedule_free": "x, the average of the schedule-free optimizer",
}
NAMELESS = re.compile(r"is a fine-tuned version of \[(None)?\]\(https://huggingface\.co/(None)?\)")
"""What upstream and TRL write of a model without a name. Remove when they do not (transformers 5.24)."""
NOT_METRICS = ("_runtime", "_per_second", "_model_preparation_time", "_jit_compilation_time")


# ---- Model card ----


def write_card_section(trainer: Any, *, only_if_present: bool = False) -> None:
    """Write the section on method, evaluation and weights into the card in `output_dir`. Rank 0 does.

    With `only_if_present` it renews a section that is there, and logs a failure instead of raising it: TRL writes its
    card before each checkpoint, so that it knows neither that one nor the final model.
    """
    if not trainer.is_world_process_zero():
        return
    file = Path(str(trainer.args.output_dir), "README.md")
    try:
        if only_if_present and not (file.is_file() and BEGIN in file.read_text(encoding="utf-8")):
            return
        card = ModelCard.load(file, ignore_metadata_errors=True)
        methods = [optimizer_name(trainer), SchedulerName(trainer.args.lr_scheduler_type).value]
        methods += ["ewa"] if trainer.args.ewa else []
        # Upstream takes over the tags of an earlier card, which may be of another method.
        tags = [tag for tag in card.data.tags or [] if tag not in (TAG, *TAGS.values())]
        card.data.tags = [*tags, TAG, *(TAGS[name] for name in methods if name in TAGS)]
        card.text = _with_section(NAMELESS.sub("was trained from scratch", card.text), _section(trainer))
        card.save(file)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # the last three from metadata that was edited
        if not only_if_present:
            raise
        logger.warning(f"The model card {file} could not be renewed: {error}")


def _with_section(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
    else:
        at = min((place for heading in HEADINGS if (place := text.find(heading)) >= 0), default=len(text))
        before, after = f"{text[:at].rstrip()}\n\n", text[at:]
    return f"{before}{BEGIN}{section}{END}{after}"


def _section(trainer: Any) -> str:
    args, state = trainer.args, trainer.state
    name, total = SchedulerName(args.lr_scheduler_type).value, state.max_steps or args.max_steps
    schedule = describe_schedule(trainer._schedule, name=name, total_steps=total if total > 0 else None)
    parts = [
        f"## Training method\n\nTrained with `{TAG}` {__version__} for {state.global_step} steps.\n\n"
        f"- Optimizer: `{optimizer_name(trainer)}`\n- Schedule: {schedule}\n- Averaging: {_averaging(trainer)}\n",
        _evaluation(trainer),
        _weights(trainer),
    ]
    return "\n".join(part for part in parts if part)


def _averaging(trainer: Any) -> str:
    args, average = trainer.args, trainer.average
    if not args.ewa:
        return "none"
    ratio = args.ewa_half_life_ratio or DEFAULT_HALF_LIFE_RATIO
    window = f"decay {args.ewa_decay:g} per step" if args.ewa_decay else f"half-life {ratio:g} of the steps so far"
    now = f", {average.half_life:.4g} steps at the last" if average is not None and average.started else ""
    return f"{WEIGHTS['ewa']}, every {args.ewa_every} step(s) after step {args.ewa_start_step}, {window}{now}"


def _evaluation(trainer: Any) -> str:
    """Return the table of the last evaluation, or of the best one if its weights were loaded."""
    state = trainer.state
    step = state.best_global_step if trainer._best_model_loaded else None
    metrics = last_evaluation(state.log_history, step=step)
    if not metrics:
        return ""
    step = metrics.pop("step")
    raw = {twin: metrics.pop(name) for name, twin in raw_twins(metrics, metric_prefixes(trainer.eval_dataset)).items()}
    rows = [["metric", "evaluation weights", "training weights"], ["---"] * 3]
    rows += [
        [name.removeprefix("eval_").replace("|", "\\|"), *(_number(v) for v in (value, raw.get(name)))]
        for name, value in metrics.items()
    ]
    table = "".join(f"| {' | '.join(row if raw else row[:2])} |\n" for row in rows)
    best = ""
    if trainer.args.metric_for_best_model is not None and state.best_metric is not None and state.best_global_step:
        metric = f"eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}"
        best = f"\nBest `{metric}`: {_number(state.best_metric)}, after step {state.best_global_step}.\n"
    return f"## Evaluation\n\nAfter step {step:g}:\n\n{table}{best}"


def last_evaluation(history: Sequence[Mapping[str, Any]], *, step: int | None) -> dict[str, float]:
    """Return `step` and the metrics of the last evaluation in a trainer's history, or of the first one after `step`."""
    records = []
    for record in history:
        metrics = {k: v for k, v in record.items() if k.startswith("eval_") and not k.endswith(NOT_METRICS)}
        metrics = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        if metrics:
            records.append((record["step"], metrics))
    if not records:
        return {}
    at = records[-1][0] if step is None else step
    of_step = [metrics for number, metrics in records if number == at]
    found: dict[str, float] = {}
    for metrics in of_step if step is None else reversed(of_step):  # after the best step other weights may be evaluated
        found |= metrics
    return found | {"step": at} if found else {}


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _weights(trainer: Any) -> str:
    source, which = trainer._evaluation.source, ""
    if trainer._best_model_loaded:
        manifest = read_manifest(trainer.state.best_model_checkpoint)
        folder = manifest["evaluation"]["folder"] if manifest else None
        source = folder.partition("/")[0] if folder else None
        which = f" after step {trainer.state.best_global_step}, the best by `{trainer.args.metric_for_best_model}`"
    imports, loader = _loader(trainer._bare_model)
    place = "folder" if trainer.hub_model_id is None else "repository"
    text = f"## Weights\n\nThe model of this {place} has the **evaluation weights**: {WEIGHTS[source]}{which}.\n\n"
    text += f"```python\n{imports}\n\nmodel = {loader.format(trainer.hub_model_id or '.')}\n```\n"
    beside = "" if source is None else ", and the evaluation weights beside them: `hf_radam.load_evaluation_model`"
    return f"{text}\nA checkpoint of the run has the **training weights** at its root, to resume from{beside}.\n"


def _loader(model: Any) -> tuple[str, str]:
    """Return the import and the call that load a model folder."""
    if is_peft(model):
        name = f"Auto{type(model).__name__}"
        return f"from peft import {name}", f'{name}.from_pretrained("{{}}")'
    name = type(model).__name__.removeprefix("FSDP")  # which FSDP2 puts before it
    kind = next((kind for kind in type(model).__mro__ if kind.__name__ == name), type(model))
    if getattr(transformers, name, None) is kind:
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.config.model_type) == name:
            name = "AutoModelForCausalLM"
        return f"from transformers import {name}", f'{name}.from_pretrained("{{}}")'
    imports = f"from {kind.__module__} import {name}"
    if kind.__module__ == "__main__":
        imports = f"# {name} is a class of the training script: define it here first."
    return imports, f'{name}.from_pretrained("{{}}")'


# ---- Hub ----


def push_checkpoint(trainer: Any, checkpoint: Path) -> Future[Any] | None:
    """Push the evaluation weights as the model, and the checkpoint where `hub_strategy` asks for it; collective.

    Upstream pushes the root of the checkpoint as the model: the training weights.

    Returns:
        The upload of the checkpoint, which reads its files until it is done; None if there is none.
    """
    args, strategy = trainer.args, trainer.args.hub_strategy
    last = [trainer.push_in_progress if trainer.is_world_process_zero() else None]
    busy = [last[0] is not None and not last[0].is_done() and not args.hub_always_push]
    if args.world_size > 1:
        dist.broadcast_object_list(busy, src=0)  # rank 0 alone knows
    if strategy == HubStrategy.END or busy[0]:
        return None
    trainer.control = trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    message = f"Training in progress, step {trainer.state.global_step}"
    common = {"repo_id": trainer.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
    jobs = [
        HfApi().upload_folder(
            folder_path=args.output_dir,
            commit_message=message,
            ignore_patterns=["_*", f"{PREFIX}*"],
            run_as_future=True,
            **common,
        )
    ]
    upload = None
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        upload = HfApi().upload_folder(
            folder_path=checkpoint,
            path_in_repo="last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name,
            commit_message=f"{message}, checkpoint",
            run_as_future=True,
            **common,
        )
        jobs.append(upload)
    if trainer.push_in_progress is None or trainer.push_in_progress.is_done():
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # upstream passes a list, too
    else:
        trainer.push_in_progress.jobs.extend(jobs)
    return upload


def uploads_final_model(trainer: Any) -> bool:
    """Return whether wandb or DVCLive is about to upload the model; a sharded one is left to upstream, with a warning.

    Their callbacks save it with a plain `Trainer`, and would upload the training weights. Every rank must have the same
    setting (`WANDB_LOG_MODEL`).
    """
    names = [
        type(callback).__name__
        for callback in trainer.callback_handler.callbacks
        if (isinstance(callback, WandbCallback) and callback._log_model.is_enabled)
        or (isinstance(callback, DVCLiveCallback) and callback._log_model is True)
    ]
    if names and trainer._evaluation.source is not None and is_sharded_in_forward(trainer):
        logger.warning(
            f"{' and '.join(names)} will not upload the evaluation weights of a sharded model. Upload the folder that "
            "save_model() writes."
        )
        return False
    return bool(names)
