"""A process that dies between any two operations on files leaves every checkpoint whole, or its successor.

Oracles: the checksums in the manifests, the state before the save, and the run that went on undisturbed, whose outcome
a resumed run must have bit for bit.
"""

import shutil
from pathlib import Path

import attempts
import crash_points
import pytest
import tiny
import torch

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.runs import check_resumable, list_checkpoints, newest_checkpoint
from hf_radam.checkpoints.storage import STAGING, interrupted, recover_interrupted_save

LIMIT = attempts.COMMON["save_total_limit"]


def names(run) -> set[tuple[str, int]]:
    return {(place.pinned_in, place.step) for place in list_checkpoints(run)}


def check(copy, *, at_least: int, pins: set[tuple[str, int]]) -> tuple:
    """Check what a run must hold at any instant; return what tells one such state from another."""
    died = (copy.parent / "died").read_text()
    places = list_checkpoints(copy)
    for place in places:
        check_resumable(place.path)
        assert STAGING not in place.path.parts or (place.path in dict(interrupted(copy)).values()), died
    found = newest_checkpoint(copy, check_resumable)
    assert found is not None and found.step >= at_least, died
    assert pins <= names(copy), died
    assert sum(not place.pinned_in for place in places) <= LIMIT + 1, died
    load_evaluation_model(copy)
    return tuple((place.pinned_in, place.step, place.path.relative_to(copy)) for place in places)


def states(copies, **expected) -> dict[tuple, Path]:
    """Every kind of state that the deaths left, with one folder of it."""
    return {check(copy, **expected): copy for copy in sorted(copies.glob("*/run"), key=lambda p: int(p.parent.name))}


def check_resumes(states, options, outcome) -> None:
    for number, copy in enumerate(states.values()):
        again = copy.parent / f"again-{number}"
        shutil.copytree(copy, again / "run")
        attempts.finish(attempts.train, again / "run", options, again / "outcome", log=again / "log")
        died = (copy.parent / "died").read_text()
        assert not attempts.differences(outcome, torch.load(again / "outcome")), died
        assert not (again / "run" / STAGING).exists(), died


SAVES = [
    # scenario, step of the save, whether it is there already, pinned before and after, operations that it must have
    ("wsd+ewa", 7, False, set(), {("_pre_decay", 7)}, {"os.link", "os.rename", "os.remove"}),
    ("wsd+ewa", 7, True, {("_pre_decay", 7)}, {("_pre_decay", 7)}, {"os.link", "os.rename", "os.remove"}),
    ("wsd_s", 7, False, set(), {("_budgets", 7)}, {"os.rename"}),
]


@pytest.mark.parametrize(
    ("scenario", "step", "again", "before", "after", "operations"),
    SAVES,
    ids=[f"{s[0]}, step {s[1]}{' again' if s[2] else ''}" for s in SAVES],
)
def test_a_save_may_die_anywhere(tmp_path, scenario, step, again, before, after, operations):
    options = attempts.SCENARIOS[scenario]
    attempts.finish(crash_points.train_forking, tmp_path, options, step, again, log=tmp_path / "log")
    every = options["save_steps"]
    at_least = step if again else (step - 1) // every * every
    left = states(tmp_path / "copies", at_least=at_least, pins=before)
    deaths = [file.read_text().split()[0] for file in tmp_path.glob("copies/*/died") if file.read_text()]
    assert operations | {"open", "os.mkdir"} <= set(deaths) and len(deaths) > 15
    whole = tmp_path / "copies" / str(len(deaths) + 1) / "run"
    assert after <= names(whole) and not (whole / STAGING).exists()
    check_resumes(left, options, torch.load(tmp_path / "outcome"))

    between = [copy for copy in left.values() if list(interrupted(copy))]
    assert bool(between) == again  # only where a folder gives its name to another are there two renames
    for number, copy in enumerate(between):
        work = copy, tmp_path / f"recovering-{number}", recover_interrupted_save
        attempts.finish(crash_points.die_at_every_operation, *work, log=tmp_path / "log of recovering")
        for recovering in states(tmp_path / f"recovering-{number}", at_least=step, pins=before).values():
            recover_interrupted_save(recovering)
            assert names(recovering) == names(copy) and not list(interrupted(recovering))


def test_pinning_what_is_resumed_may_die_anywhere(tmp_path):
    options = attempts.SCENARIOS["wsd+ewa"]
    attempts.finish(crash_points.resume_forking, tmp_path, options, {6, 7}, log=tmp_path / "log")
    left = states(tmp_path / "copies", at_least=7, pins=set())
    assert any(("_pre_decay", 7) in names(copy) for copy in left.values())
    check_resumes(left, options, torch.load(tmp_path / "outcome"))


def test_a_run_that_died_between_two_renames_is_extended(tmp_path):
    """The budget's checkpoint is moved aside here, as by a process that died before its successor took its place."""
    options = attempts.SCENARIOS["wsd_s"] | {"save_strategy": "no", "max_steps": 7, "budgets": None}
    tiny.trained(tmp_path / "run", **options)
    aside = tmp_path / "run" / STAGING / "replaced/_budgets"
    aside.mkdir(parents=True)
    (tmp_path / "run/_budgets/checkpoint-7").rename(aside / "checkpoint-7")
    tiny.trained(tmp_path / "run", **options | {"max_steps": 12, "extend_from": str(tmp_path / "run")})
    assert names(tmp_path / "run") == {("_budgets", 7), ("_budgets", 12)}
    for place in list_checkpoints(tmp_path / "run"):
        check_resumable(place.path)
