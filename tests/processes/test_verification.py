"""A checkpoint is verified by all processes together: each file by one of them, and every one hears of any damage.

Oracles: the interpreter's own audit events, which tell what each process opened; counting every sha256 that is taken;
`verify_checkpoint` by one process alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch.distributed as dist
from processes import harness
from transformers import TrainerCallback

from hf_radam import RAdamTrainer
from hf_radam.checkpoints import verify
from hf_radam.checkpoints.manifest import MANIFEST_NAME, CheckpointError, read_manifest
from hf_radam.checkpoints.runs import check_resumable
from hf_radam.checkpoints.verify import evaluation_folder, verify_checkpoint
from hf_radam.trainer.ranks import decide_on_rank0

OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}


class Begins(TrainerCallback):
    """Notes the step that training resumes from."""

    at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.at = state.global_step


def trainer_of(run: Path, *callbacks: TrainerCallback) -> RAdamTrainer:
    arguments = tiny.arguments(run, **OPTIONS | tiny.METHODS["ewa"] | harness.arguments("ddp"))
    return RAdamTrainer(tiny.llama(), arguments, train_dataset=tiny.TRAIN, callbacks=[*callbacks])


def said_by(do) -> str:
    """The error that is raised, or nothing."""
    try:
        do()
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def flip(file: Path) -> None:
    """Flip one bit in the middle of a file, or flip it back."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(file: Path) -> None:
    """The same by the first process, for which the others wait."""
    if dist.get_rank() == 0:
        flip(file)
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
    whole = decide_on_rank0(lambda verify_fn: verify_fn(newest))
    looked_at, heard, for_evaluation = list(opened), {}, {}
    for file in files:
        change(file)
        heard[file.relative_to(newest).as_posix()] = said_by(
            lambda: decide_on_rank0(lambda verify_fn: check_resumable(newest, verify_fn=verify_fn))
        )
        for_evaluation[file.relative_to(newest).as_posix()] = said_by(
            lambda: decide_on_rank0(lambda verify_fn: evaluation_folder(newest, verify_fn=verify_fn))
        )
        change(file)
    return {"whole": whole, "looked at": looked_at, "heard": heard, "for evaluation": for_evaluation}


def damaged_job(run: Path) -> tuple[str, str, int]:
    """Refuse a damaged checkpoint that is named; then train from the newest that is whole."""
    newest = run / "checkpoint-6"
    begins = Begins()
    named = said_by(lambda: trainer_of(run, begins).train(resume_from_checkpoint=str(newest)))
    trainer_of(run, begins).train(resume_from_checkpoint=True)
    gone = said_by(
        lambda: decide_on_rank0(lambda verify_fn: check_resumable(run / "checkpoint-9", verify_fn=verify_fn))
    )
    return named, gone, begins.at


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    run = tmp_path_factory.mktemp("verified")
    return run, harness.run(job, run, backend="ddp")


def test_each_file_is_looked_at_by_one_process(seen):
    run, (first, second) = seen
    assert first["whole"] == second["whole"] == {} == verify_checkpoint(run / "checkpoint-6")
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


# ---- What the trainer does ----


@contextmanager
def counted():
    """The files of which `hf_radam.checkpoints.verify` takes the sha256 meanwhile."""
    files, take = [], verify.sha256

    def counting(file):
        files.append(str(file))
        return take(file)

    verify.sha256 = counting
    yield files
    verify.sha256 = take


def trained(run, *, resume=None, **options):
    """Train; returns the files of which this process took the sha256."""
    method = {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 3, "ewa": True}
    arguments = tiny.arguments(run, **OPTIONS | method | harness.arguments("ddp") | options)
    with counted() as files:
        data = {"train_dataset": tiny.TRAIN, "eval_dataset": tiny.EVAL}
        RAdamTrainer(tiny.llama(), arguments, **data).train(resume_from_checkpoint=resume)
    return files


def ways_to_go_on(root):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    return {
        "begun": trained(root / "run"),
        "named": trained(root / "named", resume=str(root / "run/checkpoint-3")),
        "pinned": trained(root / "run", resume=str(root / "run/_pre_decay/checkpoint-3")),
        "newest": trained(root / "run", resume=True),
        "extended": trained(root / "longer", extend_from=str(root / "run"), max_steps=9),
        "best": trained(root / "best", **best),
    }


def test_the_trainer_has_every_file_verified_once(tmp_path):
    first, second = harness.run(ways_to_go_on, tmp_path, backend="ddp")
    gone_on_from = {
        "named": "run/checkpoint-3",
        "pinned": "run/_pre_decay/checkpoint-3",
        "newest": "run/checkpoint-6",
        "extended": "run/checkpoint-3",
    }
    assert first["begun"] == second["begun"] == []
    for way, folder in gone_on_from.items():
        files = read_manifest(tmp_path / folder)["files"]
        assert sorted(first[way] + second[way]) == sorted(str(tmp_path / folder / name) for name in files), way
        assert first[way] and second[way]
    both = first["best"] + second["best"]
    assert len(set(both)) == len(both) and any(name.endswith("ewa/model.safetensors") for name in both)


# ---- Folders that are not the same ----


def copies(root):
    """Each process in a folder with a copy of the checkpoint of its own; what is said of each harm to one of them."""
    harness.join_group()
    os.chdir(root / str(dist.get_rank()))
    checkpoint, said = Path("checkpoint-3"), {}

    def look():
        return said_by(lambda: decide_on_rank0(lambda verify_fn: check_resumable(checkpoint, verify_fn=verify_fn)))

    said["whole"] = look()
    for owner in (0, 1):
        for name in ("model.safetensors", "optimizer.pt", "ewa/model.safetensors", "scheduler.pt"):
            if dist.get_rank() == owner:
                flip(checkpoint / name)
            dist.barrier()
            said[f"{name} on {owner}"] = look()
            if dist.get_rank() == owner:
                flip(checkpoint / name)
            dist.barrier()
    for what in ("manifest", "folder"):
        if dist.get_rank() == 1:
            (checkpoint / MANIFEST_NAME).unlink() if what == "manifest" else shutil.rmtree(checkpoint)
        dist.barrier()
        said[f"no {what}"] = look()
    return said


def test_each_machines_copy_is_verified_whole(seen, tmp_path):
    for rank in ("0", "1"):
        shutil.copytree(seen[0] / "checkpoint-3", tmp_path / rank / "checkpoint-3")
    first, second = harness.run(copies, tmp_path, backend="ddp")
    assert first == second
    assert first.pop("whole") == ""
    for missing in ("no manifest", "no folder"):
        assert "is not the same folder on every rank" in first.pop(missing)
    for case, words in first.items():
        assert f"checkpoint-3/{case.split(' on ')[0]} has another sha256" in words, case
