"""A run of two processes that loses one of them, whichever and wherever, goes on as its undisturbed twin, bit for bit.

Oracles: the twin, the checksums in the manifests, and the list of the files that are there.
"""

import functools
import os
import signal
import tempfile
from pathlib import Path

import attempts
import failing
import many
import pytest
from processes import harness

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import MANIFEST_NAME, read_manifest
from hf_radam.checkpoints.runs import check_resumable, list_checkpoints, newest_checkpoint
from hf_radam.checkpoints.storage import STAGING

FSDP2 = ["fsdp2", "fsdp2_sharded"]
DEATHS = {
    # which rank dies, after which update, where; and the update that is gone on from
    "in training, rank 0": ((0, 3, "in training"), 2),
    "in training, rank 1": ((1, 3, "in training"), 2),
    "rank 0 before the model": ((0, 3, "before open model.safetensors"), 2),
    "rank 0 before the average": ((0, 4, "before open ewa/model.safetensors"), 3),
    "rank 0 in the optimizer": ((0, 3, "limit 130000"), 2),
    "rank 1 before its random state": ((1, 3, "before os.mkdir checkpoint-3"), 2),
    "rank 1 in its random state": ((1, 3, "limit 5000"), 2),
    "rank 0 before the manifest": ((0, 3, f"before open {MANIFEST_NAME}"), 2),
    "rank 0 before the checkpoint has its name": ((0, 3, "before os.rename checkpoint-3"), 2),
    "rank 0 before an old one goes": ((0, 4, "before shutil.rmtree removed"), 4),
}
FEWER = [
    "in training, rank 1",
    "rank 0 before the average",
    "rank 0 in the optimizer",
    "rank 1 in its random state",
    "rank 0 before the manifest",
]
"""Those that are tried under FSDP2, too, where other files are written but nothing else is done about them."""


@pytest.fixture(scope="module")
def memory():
    """A folder in memory, if there is one: nothing here depends on the disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def twins(memory):
    """What each rank of an undisturbed run ends with, by back-end and scenario; made when first asked for."""
    made = {}

    def of(backend, scenario):
        if (backend, scenario) not in made:
            run = memory / f"{backend} {scenario}" / "twin"
            made[backend, scenario] = harness.run(many.train, run, backend, many.SCENARIOS[scenario], backend=backend)
            check_files(run, backend)
        return made[backend, scenario]

    return of


def check_files(run, backend) -> None:
    """Every checkpoint of a run is whole, and its manifest has every file of every rank."""
    for place in list_checkpoints(run):
        check_resumable(place.path)
        there = {p.relative_to(place.path).as_posix() for p in place.path.rglob("*") if p.is_file()}
        assert set(read_manifest(place.path)["files"]) == there - {MANIFEST_NAME}
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= there
        if backend == "fsdp2_sharded":
            assert len([name for name in there if name.startswith("optimizer_0/__1_")]) == 1


@pytest.mark.parametrize(
    ("backend", "death"), [("ddp", death) for death in DEATHS] + [(b, d) for b in FSDP2 for d in FEWER]
)
def test_whichever_rank_dies_wherever(memory, twins, backend, death):
    scenario = "wsd+ewa" if "average" in death or "rank 1" in death else "schedule_free+ewa"
    run, options = memory / f"{backend} {scenario}" / death, many.SCENARIOS[scenario]
    dies, goes_on_from = DEATHS[death]
    if backend == "fsdp2_sharded":  # other files hold the weights
        here = dies[2].replace("ewa/model.safetensors", "ewa/sharded/__0_0")
        dies = *dies[:2], here.replace("model.safetensors", "model_fsdp_0/__0_0")
    ended = harness.run(many.train, run, backend, options, dies, backend=backend, check=False)
    assert ended[dies[0]].exit_code in (-signal.SIGKILL, -signal.SIGXFSZ), ended[dies[0]].output
    other = ended[1 - dies[0]]
    assert other.error is not None and "time was up" not in other.error, other.output

    check_files(run, backend)
    found = newest_checkpoint(run, check_resumable)
    assert found is not None and found.step == goes_on_from
    load_evaluation_model(run)
    resumed = harness.run(many.train, run, backend, options, backend=backend)
    assert [rank.pop("began at") for rank in resumed] == [goes_on_from] * 2
    for rank, twin in zip(resumed, twins(backend, scenario), strict=True):
        assert not attempts.differences({k: v for k, v in twin.items() if k != "began at"}, rank)
    assert not (run / STAGING).exists()
    check_files(run, backend)


@pytest.mark.parametrize(("rank", "bytes_left"), [(0, 70_000), (1, 5_000)], ids=["rank 0", "rank 1"])
@pytest.mark.parametrize("backend", ["ddp", *FSDP2])
def test_a_disk_that_fails_one_rank_is_told_by_both(memory, twins, backend, rank, bytes_left):
    run, options = memory / f"{backend} wsd+ewa" / f"failing {bytes_left}", many.SCENARIOS["wsd+ewa"]
    fault = functools.partial(failing.Fault, 3, f"limit {bytes_left}", run)
    told = harness.run(many.train_into_fault, run, backend, options, fault, rank, backend=backend, check=False)
    for outcome in told:
        assert outcome.error.startswith(f"CheckpointSaveError: {run}/checkpoint-3 could not be written: "), (
            outcome.output
        )
        assert "Every earlier checkpoint is as it was: make room in the folder" in outcome.error
    cause = told[rank].error.split("could not be written: ")[1].split(" (")[0].removeprefix(f"rank {rank}: ")
    assert f"could not be written: rank {rank}: {cause}" in told[1 - rank].error

    check_files(run, backend)
    found = newest_checkpoint(run, check_resumable)
    assert found is not None and found.step == 2
    resumed = harness.run(many.train, run, backend, options, backend=backend)
    for outcome, twin in zip(resumed, twins(backend, "wsd+ewa"), strict=True):
        assert attempts.differences(twin, outcome) == ["/began at"]
    assert not (run / STAGING).exists()
