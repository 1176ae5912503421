"""The facts of an inspection as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from hf_radam.inspection.facts import NOT_RESUMABLE, TRAINING, WHOLE, CheckpointFacts, X, Y
from hf_radam.inspection.phases import STABLE, WORDS
from hf_radam.inspection.run import RunFacts
from hf_radam.inspection.uses import new_total, uses

LABEL = 11  # characters
WIDTH = 118


def _count(checkpoints: Sequence[object]) -> str:
    return f"{len(checkpoints)} checkpoint{'' if len(checkpoints) == 1 else 's'}"


def checkpoint_report(facts: CheckpointFacts) -> str:
    """Everything about a checkpoint."""
    checked = "by its checksums" if facts.checked == "checksums" else "as far as the form of its files tells"
    state = facts.state if facts.state == NOT_RESUMABLE else f"{facts.state} {checked}"
    lines = [f"{facts.path}: a checkpoint of {facts.written_by}, {state}", ""]
    lines += _row("method", [_method(facts)])
    lines += _row("layout", [_layout(facts)])
    lines += _row("schedule", [facts.schedule_words or "not known"])
    lines += _row("stands at", [_standing(facts)])
    lines += _row("root", [_root(facts)])
    lines += _row("beside it", [_beside(name, facts) for name in facts.beside] or ["no other weights"])
    lines += _row("average", list(_averages(facts)) or ["none"])
    for name, use in uses(facts).items():
        lines += _row(name, [use.words])
    return "\n".join([*lines, "", *_files(facts)]) + "\n"


def run_report(facts: RunFacts) -> str:
    """The table of a run's checkpoints and what is taken for what; then its newest whole checkpoint."""
    bad = f"; damaged: {', '.join(facts.bad)}" if facts.bad else ""
    lines = [f"{facts.path}: a run with {_count(facts.checkpoints)}{bad}", ""]
    rows = [("checkpoint", "update", "phase", "state")]
    for entry in facts.checkpoints:
        one = entry.facts
        problems = "".join(f"; {name} {problem}" for name, problem in one.problems.items())
        where = WORDS[one.phase] if one.phase else "?"
        rows.append((entry.name, f"{_known(one.update)} of {_known(one.max_steps)}", where, one.state + problems))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    if facts.checkpoints:
        lines += ["  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows] + [""]
    lines += _row("model", _model(facts))
    lines += _row("resume", [f"--resume_from_checkpoint true takes {facts.resumes or 'nothing: it would refuse'}"])
    loads = facts.evaluates or "nothing: there is neither a model nor a whole checkpoint"
    lines += _row("evaluate", [f'load_evaluation_model("{facts.path}") takes {loads}'])
    lines += _row("extend", [_extension(facts)])
    for name, words in facts.leftovers.items():
        lines += _row("left over", [f"{name}: {words}"])
    newest = facts.newest_whole
    details = "" if newest is None else "\n" + checkpoint_report(newest)
    return "\n".join(lines) + "\n" + details


def _row(label: str, texts: Iterable[str]) -> Iterator[str]:
    # Paths and flags stay whole.
    wrapper = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * LABEL
    for text in texts:
        wrapper.initial_indent = label.ljust(LABEL)
        yield wrapper.fill(text)
        label = ""


def _known(number: int | None) -> str:
    return "?" if number is None else str(number)


def _method(facts: CheckpointFacts) -> str:
    average = {True: "ewa", False: "no ewa", None: "ewa not known"}[facts.ewa]
    return f"{facts.optim or 'optimizer not known'}, {facts.lr_scheduler_type or 'schedule not known'}, {average}"


def _layout(facts: CheckpointFacts) -> str:
    count = facts.processes
    return f"{facts.layout}, written by {_known(count)} process{'' if count == 1 else 'es'}"


def _standing(facts: CheckpointFacts) -> str:
    phase = WORDS[facts.phase] if facts.phase else "phase not known"
    text = f"update {_known(facts.update)} of {_known(facts.max_steps)}, {phase}"
    schedule, step = facts.schedule, facts.schedule_step
    if facts.phase == STABLE and schedule and "total_steps" in schedule:
        start = schedule["total_steps"] - schedule["decay_steps"]
        text += " (the decay begins with the next update)" if step == start else f" (the decay begins after {start})"
    if step != facts.update:
        text += f" (the schedule has counted {_known(step)}: the others were skipped)"
    rates = ", ".join(f"{rate:g}" for rate in facts.learning_rates)
    return f"{text}; learning rate of the next update {rates or 'not known'}"


def _root(facts: CheckpointFacts) -> str:
    if facts.root == TRAINING:
        same = facts.evaluation_folder == ""
        return "training weights, with which it is evaluated, too" if same else "training weights"
    average = facts.schedule_free
    if facts.root == Y:
        text = "y, the weights that train (schedule-free)"
        return text if facts.ours else f"{text}: stock Trainer saves y unless it evaluated in the same step"
    if facts.root == X:
        return "x, the averaged weights (schedule-free): stock Trainer evaluated in the same step"
    if average is None and "schedule" not in (facts.optim or ""):
        return "not known: neither the optimizer nor the arguments can be read"
    return "y or x of a schedule-free optimizer: only a readable optimizer tells which"


def _beside(name: str, facts: CheckpointFacts) -> str:
    words = {"ewa": "the averaged weights (float32)", "schedule_free": "x, the averaged weights of schedule-free"}[name]
    used = facts.evaluation_folder is not None and facts.evaluation_folder.split("/")[0] == name
    return f"{name}/: {words}{', used for evaluation' if used else ''}"


def _averages(facts: CheckpointFacts) -> Iterator[str]:
    kept = facts.averaging
    if kept is not None:
        decay, ratio, every = kept.get("decay"), kept.get("half_life_ratio"), kept.get("every")
        growing = f"growing window, half-life {ratio} of the updates since averaging began"
        window = growing if decay is None else f"fixed window, decay {decay} per update"
        counted = f"{kept.get('num_averaged')} averagings, the last at update {kept.get('last_step')}"
        if not kept.get("num_averaged"):
            counted = "not begun: evaluation does without it"
        yield f"ewa: {window}, every {every} updates after update {kept.get('start_step')}; {counted}"
    average = facts.schedule_free
    if average is not None:
        weight = average["weight_sum"]
        text = "not known" if weight is None else f"{weight:g}" if weight else "0: x and y are the same still"
        yield f"schedule-free: {_known(average['k'])} updates in x, weight_sum {text}"


def _files(facts: CheckpointFacts) -> Iterator[str]:
    sizes = {file.name: "-" if file.size is None else f"{file.size:,}" for file in facts.files}
    column = max((len(size) for size in sizes.values()), default=1)
    if facts.checked == "form":
        yield "files (without checksums to compare with: changed bytes in a file of the right form do not show)"
    else:
        yield "files (compared with their checksums)"
    for file in facts.files:
        verdict = "ok" if file.problem is None else f"BAD: {file.problem}"
        extra = " (not in the manifest)" if file.in_manifest is False else ""
        yield f"  {sizes[file.name].rjust(column)}  {file.name}  {verdict}{extra}"


def _model(facts: RunFacts) -> list[str]:
    if facts.model is None:
        return ["none at the root"]
    problems = [f"{name} {problem}" for name, problem in facts.model.problems.items()]
    stale = f", older than {facts.model.older_than}" if facts.model.older_than else ""
    return [f"at the root: evaluation weights, as save_model() wrote them{stale}", *problems]


def _extension(facts: RunFacts) -> str:
    if facts.extends is None:
        return "there is no checkpoint to extend the run from"
    source = next(e.facts for e in facts.checkpoints if e.facts.state == WHOLE and facts.extends.endswith(e.name))
    return f"--extend_from {facts.path} --max_steps N goes on from {facts.extends} ({new_total(source)})"
