"""What the folder of a run holds: its checkpoints, its model, and which of them is taken for what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_radam.checkpoints.load import holds_model, is_checkpoint, later_than_model
from hf_radam.checkpoints.manifest import PathLike
from hf_radam.checkpoints.runs import PREFIX, list_checkpoints, step_of
from hf_radam.checkpoints.storage import REPLACED, STAGING, interrupted
from hf_radam.inspection.checkpoint import inspect_checkpoint
from hf_radam.inspection.facts import WHOLE, CheckpointFacts
from hf_radam.inspection.uses import can_begin_extension, uses


@dataclass(frozen=True)
class Entry:
    """A checkpoint of a run: its name there, and what is known of it (its path is elsewhere while it is replaced)."""

    name: str
    facts: CheckpointFacts


@dataclass(frozen=True)
class ModelFacts:
    """The model at the root of a run: what is wrong with its files, and a checkpoint made after it, if there is one."""

    problems: dict[str, str]
    older_than: str | None


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        path: its folder.
        checkpoints: every checkpoint, the latest first.
        model: what `save_model()` wrote, or None.
        resumes: the path that `--resume_from_checkpoint true` takes, or None.
        evaluates: the path that `load_evaluation_model` takes, or None.
        extends: the path that `--extend_from` takes for a longer schedule, or None.
        leftovers: what lies in `_staging`, by its path in the run, in words.
    """

    path: str
    checkpoints: list[Entry]
    model: ModelFacts | None
    resumes: str | None
    evaluates: str | None
    extends: str | None
    leftovers: dict[str, str]

    @property
    def bad(self) -> list[str]:
        """Whatever is damaged in it, by name."""
        names = [entry.name for entry in self.checkpoints if entry.facts.bad]
        return names + (["the model at the root"] if self.model and self.model.problems else [])

    @property
    def newest_whole(self) -> CheckpointFacts | None:
        """The latest checkpoint in which nothing is damaged."""
        return next((entry.facts for entry in self.checkpoints if not entry.facts.bad), None)


def looks_like_checkpoint(folder: PathLike) -> bool:
    """Whether a folder is a checkpoint, be it a damaged one: by its name, or by what it has."""
    return is_checkpoint(folder)


def looks_like_run(folder: PathLike) -> bool:
    """Whether a folder is that of a run: it has checkpoints, a model, or a save that was begun."""
    return bool(list_checkpoints(folder)) or holds_model(folder) or bool(_leftovers(Path(folder)))


def inspect_run(run: PathLike) -> RunFacts:
    """Read everything that the folder of a run tells; nothing in it is changed, recovered or removed."""
    root = Path(run)
    entries = []
    for place in list_checkpoints(root):
        name = Path(place.pinned_in, f"{PREFIX}{place.step}")
        entries.append(Entry(str(name), inspect_checkpoint(place.path)))
    model = ModelFacts({}, later_than_model(root)) if holds_model(root) else None

    def first(accepts: Callable[[CheckpointFacts], bool]) -> str | None:
        return next((str(root / entry.name) for entry in entries if accepts(entry.facts)), None)

    return RunFacts(
        path=str(run),
        checkpoints=entries,
        model=model,
        resumes=first(lambda facts: facts.state == WHOLE),
        evaluates=str(run) if model and not model.problems else first(_is_taken_for_evaluation),
        extends=first(can_begin_extension),
        leftovers=_leftovers(root),
    )


def _is_taken_for_evaluation(facts: CheckpointFacts) -> bool:
    path = Path(facts.path)
    return is_checkpoint(path) and holds_model(path) and (not facts.bad or uses(facts)["evaluate"].possible)


def _leftovers(root: Path) -> dict[str, str]:
    """What a killed process left, which the next one that writes into the run puts in order."""
    staging, found = root / STAGING, {}
    if not staging.is_dir():
        return {}
    successors = {now: target for target, now in interrupted(root)}
    for folder in sorted(path for path in staging.rglob(f"{PREFIX}*") if path.is_dir() and step_of(path) is not None):
        inside = folder.relative_to(staging)
        if folder in successors:
            words = f"takes the place of {successors[folder].relative_to(root)} when the run is resumed or saves again"
        elif inside.parts[0] == REPLACED:
            words = "an older checkpoint that was replaced"
        elif inside.parts[0] == "removed":
            words = "a checkpoint that was being removed"
        else:
            words = "a save that did not come to its end"
        found[str(folder.relative_to(root))] = words
    return found
