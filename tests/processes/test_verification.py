"""A checkpoint is verified by all processes together: each file by one of them, and every one hears of any damage.

Oracles: the interpreter's own audit events, which tell what each process opened; `damage` by one process alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch.distributed as dist
from processes import harness
from transformers import TrainerCallback

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.integrity import damage, evaluation_folder
from hf_radam.checkpoints.manifest import MANIFEST_NAME, CheckpointError, read_manifest
from hf_radam.checkpoints.runs import check_resumable
from hf_radam.training.verification import agreed

OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}


class Begins(TrainerCallback):
    """Notes the update that training goes on from."""

    at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.at = state.global_step


def trainer_of(run: Path, *callbacks: TrainerCallback) -> RAdamTrainer:
    arguments = tiny.arguments(run, **OPTIONS | tiny.METHODS["ewa"] | harness.arguments("ddp"))
    return RAdamTrainer(tiny.llama(), arguments, train_dataset=tiny.TRAIN, callbacks=[*callbacks])


def said(do) -> str:
    """The error that is raised, or nothing."""
    try:
        do()
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def change(file: Path) -> None:
    """Flip one bit in the middle of a file, or flip it back: the first process does, and the others wait."""
    if dist.get_rank() == 0:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()


def job(run: Path) -> dict:
    trainer_of(run).train()
    newest = run / "checkpoint-6"
    files = [newest / name for name in read_manifest(newest)["files"]]
    opened: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(str(newest)):
            opened.append(Path(str(arguments[0])).relative_to(newest).as_posix())

    sys.addaudithook(hook)
    whole = agreed(lambda find: find(newest))
    looked_at, heard, for_evaluation = list(opened), {}, {}
    for file in files:
        change(file)
        heard[file.relative_to(newest).as_posix()] = said(
            lambda: agreed(lambda find: check_resumable(newest, find=find))
        )
        for_evaluation[file.relative_to(newest).as_posix()] = said(
            lambda: agreed(lambda find: evaluation_folder(newest, find=find))
        )
        change(file)
    return {"whole": whole, "looked at": looked_at, "heard": heard, "for evaluation": for_evaluation}


def damaged_job(run: Path) -> tuple[str, str, int]:
    """Refuse a damaged checkpoint that is named; then train from the newest that is whole."""
    newest = run / "checkpoint-6"
    begins = Begins()
    named = said(lambda: trainer_of(run, begins).train(resume_from_checkpoint=str(newest)))
    trainer_of(run, begins).train(resume_from_checkpoint=True)
    gone = said(lambda: agreed(lambda find: check_resumable(run / "checkpoint-9", find=find)))
    return named, gone, begins.at


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    run = tmp_path_factory.mktemp("verified")
    return run, harness.run(job, run, backend="ddp")


def test_each_file_is_looked_at_by_one_process(seen):
    run, (first, second) = seen
    assert first["whole"] == second["whole"] == {} == damage(run / "checkpoint-6")
    mine, others = (set(rank["looked at"]) - {MANIFEST_NAME} for rank in (first, second))
    assert mine | others == read_manifest(run / "checkpoint-6")["files"].keys() and not mine & others
    assert sum(1 for name in mine | others if name.endswith("model.safetensors")) == 2
    sizes = [sum((run / "checkpoint-6" / name).stat().st_size for name in names) for names in (mine, others)]
    assert min(sizes) > 0.45 * sum(sizes)


def test_damage_of_any_file_reaches_every_process(seen):
    run, (first, second) = seen
    assert first["heard"] == second["heard"] and first["for evaluation"] == second["for evaluation"]
    for name, error in first["heard"].items():
        bad = f"{run / 'checkpoint-6' / name} has another sha256 than when it was written"
        assert bad in error, name
        concerns = name.startswith("ewa/") and name.endswith((".safetensors", ".json"))
        assert (bad in first["for evaluation"][name]) == concerns, name


def test_a_damaged_checkpoint_is_refused_or_passed_over_by_all(seen):
    run, _ = seen
    with (run / "checkpoint-6/ewa/model.safetensors").open("r+b") as file:
        file.write(b"!")
    for named, gone, at in harness.run(damaged_job, run, backend="ddp"):
        assert "ewa/model.safetensors has another sha256" in named
        assert "checkpoint-9" in gone
        assert at == 3


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_the_shares_are_the_whole(seen, tmp_path, parts):
    copy = tmp_path / "checkpoint-6"
    shutil.copytree(seen[0] / "checkpoint-3", copy)
    (copy / "optimizer.pt").unlink()
    with (copy / "ewa/model.safetensors").open("ab") as file:
        file.write(b"1")
    shares = [damage(copy, share=(part, parts)) for part in range(parts)]
    assert sum(map(len, shares)) == 2
    assert {name: problem for share in shares for name, problem in share.items()} == damage(copy)
