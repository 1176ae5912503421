"""A save that fails leaves every earlier checkpoint complete and says what to do; training then resumes as its twin.

The failures are real: a limit on the size of files, a full file system, a folder that may not be written to. One run
suffers them in turn. Oracles: the checksums in the manifests, and the outcome of the run that did not fail.
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

# Without special rights the kernels would be compiled again in each process: there is no place to keep them.
UNFUSED = {"fused_optimizer": "false"}
SAVES = {
    "wsd+ewa": attempts.SCENARIOS["wsd+ewa"] | UNFUSED,
    "save_strategy best": attempts.SCENARIOS["schedule_free+ewa"]
    | {"save_strategy": "best", "metric_for_best_model": "eval_loss"}
    | UNFUSED,
}
# Every model file of these runs is larger than the first limit, and the state of the optimizer than the second.
FAULTS = ["limit 70000", "limit 130000", "read-only"]
LEFT = [20_000, 300_000]
"""Bytes left on a full disk: too little for one part of a checkpoint or another."""


@pytest.fixture
def folder():
    """A folder that somebody without special rights can reach (pytest's own cannot be, under root)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        (Path(name) / "run").mkdir()
        yield Path(name)


def fail(folder, options, at, kind) -> None:
    """Train into a fault, and look at what is said and left."""
    run, message = folder / "run", folder / "message"
    attempts.finish(failing.train_into_fault, run, options, at, kind, message, log=folder / "log")
    said = message.read_text()
    assert f"checkpoint-{at} could not be written: " in said and " free)" in said
    assert "--resume_from_checkpoint true: every earlier checkpoint is intact" in said
    assert kind != "read-only" or "Permission denied" in said
    assert kind == "read-only" or not (run / STAGING).exists()
    checkpoints = list_checkpoints(run)
    assert checkpoints and checkpoints[0].step < at
    for checkpoint in checkpoints:
        load_evaluation_model(checkpoint.path)
        check_resumable(checkpoint.path)


def finish_as_its_twin(folder, options) -> None:
    attempts.finish(attempts.train, folder / "run", options, folder / "outcome", log=folder / "log")
    assert not (folder / "run" / STAGING).exists()
    (folder / "twin").mkdir()
    attempts.finish(attempts.train, folder / "twin/run", options, folder / "twin/outcome", log=folder / "twin/log")
    assert not attempts.differences(torch.load(folder / "twin/outcome"), torch.load(folder / "outcome"))


@pytest.mark.parametrize("name", SAVES)
def test_writes_that_fail(folder, name):
    for kind in FAULTS:
        fail(folder, SAVES[name], 8, kind)
    (folder / "run").chmod(0o755)
    finish_as_its_twin(folder, SAVES[name])


def test_a_disk_that_is_full(folder):
    """A small file system in memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk, options = folder / "disk", SAVES["wsd+ewa"]
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m,mode=777", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        (disk / "run").mkdir()
        for left in LEFT:
            fail(disk, options, 6, f"fill {left}")
            (disk / "filler").unlink()
        finish_as_its_twin(disk, options)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
