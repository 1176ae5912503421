"""A checkpoint is verified before it is resumed, by rank 0, and every rank hears of what is wrong with it.

Oracles: counting every sha256 that is taken; the manifest's list of files; a bit that is flipped here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch.distributed as dist
from processes import harness

from hf_radam import RAdamTrainer
from hf_radam.checkpoints import verify
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest

OPTIONS = {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 3, "ewa": True, "max_steps": 6}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
FROM = {  # way to resume: the checkpoint that it verifies
    "named": "run/checkpoint-3",
    "pinned": "run/_pre_decay/checkpoint-3",
    "newest": "run/checkpoint-6",
    "extended": "run/checkpoint-3",
}


def trained(run: Path, *, resume=None, **options) -> list[str]:
    """Train; return the files of which this rank took the sha256 to verify them."""
    files, take = [], verify.sha256
    verify.sha256 = lambda file: files.append(str(file)) or take(file)
    saving = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    arguments = tiny.arguments(run, **OPTIONS | saving | harness.arguments("ddp") | options)
    try:
        data = {"train_dataset": tiny.TRAIN, "eval_dataset": tiny.EVAL}
        RAdamTrainer(tiny.llama(), arguments, **data).train(resume_from_checkpoint=resume)
    finally:
        verify.sha256 = take
    return files


def error_of(run: Path, resume: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        trained(run, resume=resume)
    return str(caught.value)


def on_rank(number: int, do, *args) -> None:
    if dist.get_rank() == number:
        do(*args)
    dist.barrier()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def job(root: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    run = root / "run"
    hashed = {
        "begun": trained(run),
        "named": trained(root / "named", resume=str(run / "checkpoint-3")),
        "pinned": trained(run, resume=str(run / "_pre_decay/checkpoint-3")),
        "newest": trained(run, resume=True),
        "extended": trained(root / "longer", extend_from=str(run), max_steps=9),
        "best": trained(root / "best", **BEST),
    }
    errors = {}
    for name in ("rng_state_1.pth", "ewa/model.safetensors"):
        on_rank(0, flip, run / "checkpoint-6" / name)
        errors[name] = error_of(run, str(run / "checkpoint-6"))
        hashed[f"newest but {name}"] = trained(root / "run", resume=True, max_steps=6)
        on_rank(0, flip, run / "checkpoint-6" / name)
    on_rank(0, lambda: [shutil.copytree(run / "checkpoint-3", root / rank / "checkpoint-3") for rank in "01"])
    os.chdir(root / str(dist.get_rank()))
    on_rank(1, flip, Path("checkpoint-3/optimizer.pt"))
    errors["another copy"] = error_of(run, "checkpoint-3")
    on_rank(1, shutil.rmtree, "checkpoint-3")
    errors["another folder"] = error_of(run, "checkpoint-3")
    return hashed, errors


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = tmp_path_factory.mktemp("verified")
    return root, harness.run(job, root, backend="ddp")


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(checkpoint / name) for name in read_manifest(checkpoint)["files"])


def test_every_file_is_verified_once_before_it_is_loaded(seen):
    root, ((first, _), (second, _)) = seen
    assert first["begun"] == [] and not any(second.values())
    for way, folder in FROM.items():
        assert sorted(first[way]) == files_of(root / folder), way
    assert len(set(first["best"])) == len(first["best"])
    assert any(name.endswith("ewa/model.safetensors") for name in first["best"])


def test_every_rank_hears_of_a_damaged_file(seen):
    root, ((first, here), (_, there)) = seen
    assert here == there
    assert "checkpoint-3 is not the same folder on every rank" in here.pop("another folder")
    assert "checkpoint-3/optimizer.pt has another sha256" in here.pop("another copy")
    for name, error in here.items():
        assert f"{root / 'run/checkpoint-6' / name} has another sha256 than when it was written" in error
        # The newest one is passed over.
        assert set(first[f"newest but {name}"]) >= set(files_of(root / "run/checkpoint-3")), name
