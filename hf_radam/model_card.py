"""The part of a model card that is ours: how the model was trained, which weights it ships, how to load each kind.

Pure functions from facts to text; `hf_radam.training.card_facts` finds the facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hf_radam.averaging import half_life_of

HEADINGS = ("\n## Model description\n", "\n## Training procedure\n")
"""Headings of upstream and of TRL, before the first of which our part stands; without any, at the end."""
BEGIN, END = "<!-- hf_radam -->\n", "<!-- hf_radam: end -->\n"
"""Lines around our part that nobody sees, by which it is found again."""
OWN_TAG = "hf_radam"
TAGS = {"radam": "radam", "radam_schedulefree": "schedule-free", "wsd": "wsd", "wsd_s": "wsd-s", "ewa": "ewa"}
"""Tags of the methods, by the names that the flags have."""
TRAINING = "training"
KINDS = {
    TRAINING: "the weights as the optimizer left them",
    "ewa": "the average of the weights (EWA)",
    "schedule_free": "x, the average that the schedule-free optimizer keeps",
}
"""Kinds of weights: those that train, and what evaluation uses instead, by its folder in a checkpoint."""
VARIABLES = {TRAINING: "training", "ewa": "averaged", "schedule_free": "x"}
NAMELESS = re.compile(r"is a fine-tuned version of \[(None)?\]\(https://huggingface\.co/(None)?\)")
"""Of upstream, and of TRL."""


@dataclass(frozen=True)
class Averaging:
    """The window of an EWA, as its flags have it, and how far back it looked after an update.

    Attributes:
        half_life: in updates; None if it has not begun, or that was not logged.
        update: when it was that.
    """

    decay: float | None
    half_life_ratio: float | None
    every: int
    start_step: int
    half_life: float | None
    update: int


@dataclass(frozen=True)
class Evaluation:
    """Metrics after an update, of the evaluation weights and, where they were evaluated, of the training weights."""

    update: int
    metrics: Mapping[str, float]
    raw: Mapping[str, float]


@dataclass(frozen=True)
class Best:
    """The best evaluation: by which metric, its value, after which update, and whether its weights were loaded."""

    metric: str
    value: float
    update: int
    loaded: bool


@dataclass(frozen=True)
class Loader:
    """Python that loads a model: lines that come first, and an expression with `{}` for the folder in quotes."""

    preamble: str
    call: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint beside the card.

    Attributes:
        path: its path from there.
        folders: path of the folder with each kind of weights in it, a key of `KINDS`.
        sharded: whether its weights are in shards, which must be put together first.
        best: whether it is that of the best weights, which were loaded.
    """

    path: str
    folders: Mapping[str, str]
    sharded: bool
    best: bool = False


@dataclass(frozen=True)
class Facts:
    """What a card says of a training.

    Attributes:
        version: of hf_radam.
        optimizer: its name.
        schedule: the name of the schedule.
        schedule_in_words: what it does, from the first update to the last.
        updates: how many were made.
        averaging: of the EWA, or None.
        kind: what the evaluation weights are, a key of `KINDS`.
        evaluation: the last one, or that of the best weights where those were loaded; None if there was none.
        best: the best evaluation, where one was looked for.
        repository: name on the hub, or None.
        holds_model: whether there is a model beside the card.
        loader: for any model folder of the run; None for an adapter that does not name its base model.
        evaluation_loader: for a checkpoint, of which it takes the evaluation weights.
        checkpoint: the best one where it was loaded, else the newest, or None.
    """

    version: str
    optimizer: str
    schedule: str
    schedule_in_words: str
    updates: int
    averaging: Averaging | None
    kind: str
    evaluation: Evaluation | None
    best: Best | None
    repository: str | None
    holds_model: bool
    loader: Loader | None
    evaluation_loader: Loader
    checkpoint: Checkpoint | None


def has_our_part(card: str) -> bool:
    """Whether a card has a part of ours."""
    return BEGIN in card and END in card


def completed(card: str, facts: Facts) -> str:
    """A card with our part, instead of the one that it has, and our tags.

    Args:
        card: upstream's card, PEFT's or TRL's, which begins with metadata in YAML.
        facts: what our part says.

    Raises:
        ValueError: if it does not begin so, or its tags are no list.
    """
    try:
        _, metadata, text = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)  # a name may end so
        data: dict[str, Any] = dict(yaml.safe_load(metadata))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError("The card does not begin with metadata in YAML between two lines of ---.") from error
    given = data.get("tags") or []
    if not isinstance(given, list):
        raise ValueError(f"The card's metadata has the tags {given!r}, which are no list.")
    # Upstream takes over the tags of a card that is there, which may be of another method.
    data["tags"] = [tag for tag in given if tag not in (OWN_TAG, *TAGS.values())] + tags(facts)
    # Remove when transformers and TRL do not name a base model that has no name.
    text = NAMELESS.sub("was trained from scratch", text)
    if has_our_part(text):
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
    else:
        at = min((place for heading in HEADINGS if (place := text.find(heading)) >= 0), default=len(text))
        before, after = f"{text[:at].rstrip()}\n\n", text[at:]
    return f"---\n{yaml.dump(data, sort_keys=False)}---\n{before}{BEGIN}{section(facts)}{END}{after}"


def tags(facts: Facts) -> list[str]:
    """Tags for the methods that were on."""
    names = [facts.optimizer, facts.schedule, *(["ewa"] if facts.averaging else [])]
    return [OWN_TAG, *(TAGS[name] for name in names if name in TAGS)]


def section(facts: Facts) -> str:
    """Our part in Markdown: the method, the evaluation of each kind of weights, and how to load each."""
    parts = [_method(facts), _evaluation(facts), _weights(facts), _checkpoint(facts)]
    return "\n".join(part for part in parts if part)


def _method(facts: Facts) -> str:
    optimizer = f"`{facts.optimizer}`"
    if facts.optimizer == "radam_schedulefree":
        optimizer += ": it trains y, at which the gradients are taken, and x, an average, is what it is meant to give"
    done = f"{facts.updates} updates" if facts.updates else "by a trainer that had made no update"
    return (
        f"## Training method\n\nTrained with `{OWN_TAG}` {facts.version}, {done}.\n\n"
        f"- Optimizer: {optimizer}\n"
        f"- Schedule: {facts.schedule_in_words}\n"
        f"- Averaging: {'none' if facts.averaging is None else _averaging(facts.averaging)}\n"
    )


def _averaging(averaging: Averaging) -> str:
    when = "every update" if averaging.every == 1 else f"every {averaging.every} updates"
    late = f" after the first {averaging.start_step}" if averaging.start_step else ""
    if averaging.decay is None:
        window = f"with a half-life of {averaging.half_life_ratio:g} of the updates since it began"
    else:
        updates = half_life_of(1.0 - averaging.decay, every=1)
        window = f"with a decay of {averaging.decay:g} per update, which is a half-life of {updates:.4g} updates"
    now = "" if averaging.half_life is None else f"; {averaging.half_life:.4g} updates after update {averaging.update}"
    return f"exponentially weighted average of the weights (EWA), moved {when}{late}, {window}{now}"


def _evaluation(facts: Facts) -> str:
    if facts.evaluation is None:
        return ""
    metrics, raw = facts.evaluation.metrics, facts.evaluation.raw
    rows = [["metric", "evaluation weights"], ["---", "---"]]
    rows += [[name.removeprefix("eval_").replace("|", "\\|"), _number(value)] for name, value in metrics.items()]
    if raw:
        beside = [_number(raw[name]) if name in raw else "" for name in metrics]
        rows = [[*row, cell] for row, cell in zip(rows, ["training weights", "---", *beside], strict=True)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    text = f"## Evaluation\n\nAfter update {facts.evaluation.update}:\n\n{table}"
    best = facts.best
    if best is not None:
        text += f"\nBest `{best.metric}`: {_number(best.value)}, after update {best.update}.\n"
    return text


def _number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _weights(facts: Facts) -> str:
    kind = KINDS[facts.kind]
    if facts.best is not None and facts.best.loaded:
        kind += f" after update {facts.best.update}, the best by `{facts.best.metric}`"
    if not facts.holds_model:
        return f"## Weights\n\nNo model was beside this card yet. The evaluation weights are {kind}.\n"
    place = "folder" if facts.repository is None else "repository"
    text = f"## Weights\n\nThis {place} holds the **evaluation weights**: {kind}."
    if facts.loader is None:
        return text + " The adapter does not name its base model, which has to be loaded first.\n"
    return text + "\n\n" + _block(facts.loader, [("model", facts.repository or ".", "")])


def _checkpoint(facts: Facts) -> str:
    checkpoint = facts.checkpoint
    if checkpoint is None or facts.loader is None:
        return ""
    which = "The best" if checkpoint.best else "A"
    text = (
        f"{which} checkpoint of the run has the **training weights** at its root and the others beside them. It lies "
        "in the folder of the run; on the hub only with `--hub_strategy checkpoint` (as `last-checkpoint`) or "
        "`all_checkpoints`."
    )
    if checkpoint.sharded:
        text += f" Its weights are in shards, which `hf-radam consolidate {checkpoint.path}` puts together."
    else:
        folders = checkpoint.folders.items()
        text += "\n\n" + _block(facts.loader, [(VARIABLES[kind], path, KINDS[kind]) for kind, path in folders])
    evaluation = _block(facts.evaluation_loader, [("model", checkpoint.path, "")])
    return f"{text.rstrip()}\n\nThe weights that evaluation used, without asking which they were:\n\n{evaluation}"


def _block(loader: Loader, models: Iterable[Sequence[str]]) -> str:
    """A block of Python that loads models, each given as the name of a variable, its folder and a comment."""
    lines = []
    for variable, folder, comment in models:
        quoted = f'"{folder}"'
        lines.append(f"{variable} = {loader.call.format(quoted)}" + (f"  # {comment}" if comment else ""))
    return f"```python\n{loader.preamble}\n\n" + "\n".join(lines) + "\n```\n"
