"""A run of two processes that loses one of them, whichever and wherever, resumes as its undisturbed twin, bit for bit.

Oracles: the twin, the checksums in the manifests, and the list of the files that are there.
"""

import signal

import attempts
import many
import pytest
from processes import harness

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import MANIFEST_NAME, read_manifest
from hf_radam.checkpoints.runs import check_resumable, list_checkpoints, newest_checkpoint
from hf_radam.checkpoints.storage import STAGING

# Which rank is lost, after which step, where. One run suffers them in turn, each time resumed from step 2.
STAGING_FAILS = [
    (1, 3, "limit 5000"),  # in its random state
    (0, 3, "fails 70000"),
    (0, 4, "before open ewa/model.safetensors"),
]
DEATHS = {
    ("ddp", "wsd+ewa"): [
        (1, 3, "in training"),
        (0, 3, "limit 130000"),  # in the optimizer
        (0, 3, f"before open {MANIFEST_NAME}"),
        *STAGING_FAILS,
    ],
    ("ddp", "schedule_free+ewa"): [
        (0, 3, "in training"),
        (1, 3, "before os.mkdir checkpoint-3"),
        (0, 3, "before os.rename checkpoint-3"),
        (0, 4, "before shutil.rmtree removed"),  # the old one goes when the new one is there
    ],
    ("fsdp2", "wsd+ewa"): STAGING_FAILS,
    ("fsdp2_sharded", "wsd+ewa"): [(1, 3, "fails 5000"), (0, 3, f"before open {MANIFEST_NAME}"), *STAGING_FAILS],
}
NEWEST = {"before open ewa/model.safetensors": 3, "before shutil.rmtree removed": 4}
"""The step of the newest checkpoint after a death; 2 unless told."""


def check_files(run, backend) -> None:
    """Every checkpoint of a run is complete, and its manifest has every file of every rank."""
    for checkpoint in list_checkpoints(run):
        check_resumable(checkpoint.path)
        there = {p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*") if p.is_file()}
        assert set(read_manifest(checkpoint.path)["files"]) == there - {MANIFEST_NAME}
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= there
        if backend == "fsdp2_sharded":
            assert len([name for name in there if name.startswith("optimizer_0/__1_")]) == 1


@pytest.mark.parametrize(("backend", "scenario"), DEATHS)
def test_whichever_rank_is_lost_wherever(tmp_path, backend, scenario):
    options, run = many.SCENARIOS[scenario], tmp_path / f"{backend} {scenario}"
    twins = harness.run(many.train, tmp_path / "twin" / run.name, backend, options, backend=backend)
    check_files(tmp_path / "twin" / run.name, backend)
    for rank, step, where in DEATHS[backend, scenario]:
        here = where
        if backend == "fsdp2_sharded":  # other files hold the weights
            here = where.replace("ewa/model.safetensors", "ewa/sharded/__0_0")
            here = here.replace("model.safetensors", "model_fsdp_0/__0_0")
        death = (rank, step, here)
        ended = harness.run(many.train, run, backend, options, death, backend=backend, check=False, grace=5)
        lost, other = ended[rank], ended[1 - rank]
        if where.startswith("fails"):
            assert f"checkpoint-3 could not be written on rank {rank}: " in lost.error, lost.output
        else:
            assert lost.exit_code in (-signal.SIGKILL, -signal.SIGXFSZ), (where, lost.output)
        assert other.error is not None and "time was up" not in other.error, (where, other.output)
        check_files(run, backend)
        found = newest_checkpoint(run, check_resumable)
        assert found is not None and found.step == NEWEST.get(where, 2), where
        load_evaluation_model(run)
    resumed = harness.run(many.train, run, backend, options, backend=backend)
    for outcome, twin in zip(resumed, twins, strict=True):
        assert attempts.differences(twin, outcome) == ["/began at"]
    assert not (run / STAGING).exists()
    check_files(run, backend)
