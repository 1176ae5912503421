"""A save that fails leaves every earlier checkpoint whole and says what to do; training then goes on as its twin.

The failures are real: a limit on the size of files, a full file system, a folder that may not be written to. Oracles:
the checksums in the manifests, and the outcome of the run that did not fail.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import attempts
import failing
import pytest
import torch

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.runs import check_resumable, list_checkpoints
from hf_radam.checkpoints.storage import STAGING

SAVES = {
    "wsd+ewa": attempts.SCENARIOS["wsd+ewa"],
    "schedule_free+ewa": attempts.SCENARIOS["schedule_free+ewa"],
    "load_best_model_at_end": attempts.SCENARIOS["ewa, best"],
    "save_strategy best": attempts.SCENARIOS["ewa, best"]
    | {"save_strategy": "best", "load_best_model_at_end": False, "metric_for_best_model": "eval_loss"},
    "save_only_model": attempts.SCENARIOS["schedule_free+ewa"] | {"save_only_model": True},
}
MODEL_BYTES, OPTIMIZER_BYTES = 70_000, 130_000
"""Every model file of these runs is larger than the first, and the state of the optimizer than the second."""


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Outcome of every run when nothing fails."""
    made = {}
    for number, (name, options) in enumerate(SAVES.items()):
        folder = tmp_path_factory.mktemp(f"twin-{number}")
        attempts.finish(attempts.train, folder / "run", options, folder / "outcome", log=folder / "log")
        made[name] = torch.load(folder / "outcome")
    return made


@pytest.fixture
def folder():
    """A folder that somebody without special rights can reach (pytest's own cannot be, under root)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        (Path(name) / "run").mkdir()
        yield Path(name)


def fail_and_go_on(folder, options, at, kind, twin, *, lift=lambda: None) -> str:
    """Train into a fault, look at what is left, lift the fault, go on to the end; returns what was said of it."""
    run, message = folder / "run", folder / "message"
    attempts.finish(failing.train_into_fault, run, options, at, kind, message, log=folder / "log")
    told = message.read_text()
    assert f"checkpoint-{at} could not be written: " in told and " free)" in told
    assert "Every earlier checkpoint is as it was: make room in the folder or make it writable" in told
    assert "go on with --resume_from_checkpoint true" in told
    if kind != "read-only":
        assert not (run / STAGING).exists()
    places = list_checkpoints(run)
    assert places and places[0].step < at
    load_evaluation_model(run)
    lift()
    if "save_only_model" in options:
        for place in places:
            load_evaluation_model(place.path)
        return told
    for place in places:
        check_resumable(place.path)
    attempts.finish(attempts.train, run, options, folder / "outcome", log=folder / "log")
    assert not attempts.differences(twin, torch.load(folder / "outcome"))
    assert not (run / STAGING).exists()
    return told


@pytest.mark.parametrize("size", [MODEL_BYTES, OPTIMIZER_BYTES], ids=["model", "optimizer"])
@pytest.mark.parametrize("name", SAVES)
def test_a_file_that_may_not_grow(folder, twins, name, size):
    if name == "save_only_model" and size == OPTIMIZER_BYTES:
        pytest.skip("saves no optimizer")
    fail_and_go_on(folder, SAVES[name], 8, f"limit {size}", twins[name])


@pytest.mark.parametrize("name", SAVES)
def test_a_folder_that_may_not_be_written_to(folder, twins, name):
    lift = (folder / "run").chmod
    told = fail_and_go_on(folder, SAVES[name], 8, "read-only", twins[name], lift=lambda: lift(0o755))
    assert "Permission denied" in told


@pytest.mark.parametrize("left", [20_000, 150_000, 300_000, 400_000])
@pytest.mark.parametrize("name", ["wsd+ewa", "schedule_free+ewa"])
def test_a_disk_that_is_full(folder, twins, name, left):
    """A small file system in memory with so many bytes left: too little for one part of a checkpoint or another."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m,mode=777", "tmpfs", str(folder / "disk")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        (folder / "disk/run").mkdir()
        lift = (folder / "disk/filler").unlink
        fail_and_go_on(folder / "disk", SAVES[name], 6, f"fill {left}", twins[name], lift=lift)
    finally:
        subprocess.run(["umount", str(folder / "disk")], check=True)
