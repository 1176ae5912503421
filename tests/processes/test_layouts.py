"""What the files of a checkpoint in any layout tell: which it is, who wrote it, and whether all of it is there.

The checkpoints are of stock `Trainer`, whose form is all there is to go by. Oracles: the back-end that was asked for,
and the damage itself.
"""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import tiny
import torch
from inspecting import inspect
from processes import harness
from transformers import Trainer

from hf_radam.checkpoints.dcp_folders import METADATA_NAME, plain_values, read_metadata
from hf_radam.checkpoints.layouts import DEEPSPEED, FSDP_FULL, FSDP_SHARDED, layout_of, process_count, zero_stages
from hf_radam.checkpoints.loading import load_evaluation_model
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.runs import check_resumable
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.inspection.checkpoint import inspect_checkpoint

EXPECTED = {"fsdp2": FSDP_FULL, "fsdp2_sharded": FSDP_SHARDED, "zero2": DEEPSPEED, "zero3_ungathered": DEEPSPEED}
STEP = 2


def write(folder, backend):
    options = {"max_steps": STEP + 1, "save_strategy": "steps", "save_steps": STEP, "optim": "adamw_torch"}
    arguments = tiny.stock_arguments(folder, **options | harness.arguments(backend))
    Trainer(tiny.llama(), arguments, train_dataset=tiny.TRAIN).train()


@pytest.fixture(scope="module", params=EXPECTED)
def written(request, tmp_path_factory):
    if reason := harness.missing(request.param):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(request.param)
    harness.run(write, folder, request.param, backend=request.param)
    return request.param, folder / f"checkpoint-{STEP}"


def test_a_whole_one_is_whole(written, capsys):
    backend, checkpoint = written
    layout = layout_of(checkpoint)
    assert (layout, process_count(checkpoint), verify_checkpoint(checkpoint)) == (EXPECTED[backend], 2, {})
    check_resumable(checkpoint)
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and f"layout {layout.words}, written by 2 processes" in text
    assert f"resume --resume_from_checkpoint {checkpoint}, with the flags" in text
    assert ("with the same stage and number of processes (2)" in text) == (layout is DEEPSPEED)
    facts = inspect_checkpoint(checkpoint)
    assert (facts.state, facts.update, facts.root) == ("whole", STEP, "training weights")
    if layout is DEEPSPEED:
        assert zero_stages(checkpoint) == ((1, 2) if backend == "zero2" else (3,))
    if backend in ("fsdp2_sharded", "zero3_ungathered"):
        with pytest.raises(CheckpointError, match="model.safetensors is missing: the weights lie in .*/, in shards"):
            load_evaluation_model(checkpoint)
    else:
        load_evaluation_model(checkpoint)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-300])


def flip(file):
    """Change one bit among numbers, which are the stretches where hardly two bytes are the same."""
    content = bytearray(file.read_bytes())
    numbers = (p for p in range(len(content) // 2, len(content)) if len(set(content[p : p + 24])) > 18)
    content[next(numbers) + 12] ^= 1
    file.write_bytes(content)


HARMS = {
    "fsdp2": {
        "optimizer.bin": (truncate, flip),
        "pytorch_model_fsdp.bin": (truncate, flip),
        "model.safetensors": (truncate,),
        "scheduler.pt": (truncate, flip),
    },
    "fsdp2_sharded": {
        "optimizer_0/__1_0.distcp": (truncate, flip, "remove"),
        "optimizer_0/.metadata": (truncate, "remove"),
        "pytorch_model_fsdp_0/__0_0.distcp": (truncate, flip, "remove"),
        "pytorch_model_fsdp_0/.metadata": (truncate, "remove"),
        "pytorch_model_fsdp_0": ("remove",),
    },
    "zero2": {
        "latest": (truncate, "remove"),
        "global_step2/mp_rank_00_model_states.pt": (truncate, flip),
        "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt": (truncate, flip, "remove"),
    },
    "zero3_ungathered": {
        "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt": (truncate, flip, "remove"),
        "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt": (truncate, flip, "remove"),
    },
}
LOST = {"fsdp2": "optimizer.bin", "fsdp2_sharded": "optimizer_0"}


def test_damage_is_told_by_the_file(written, tmp_path, capsys):
    backend, checkpoint = written
    for name, harms in HARMS[backend].items():
        for number, harm in enumerate(harms):
            copy = tmp_path / f"{number}_{name.replace('/', '_')}" / checkpoint.name
            shutil.copytree(checkpoint, copy)
            if harm != "remove":
                harm(copy / name)
            elif (copy / name).is_dir():
                shutil.rmtree(copy / name)
            else:
                (copy / name).unlink()
            assert list(verify_checkpoint(copy)) == [name], harm
            with pytest.raises(CheckpointError, match=name):
                check_resumable(copy)
            assert inspect(copy, capsys)[0] == 1


def test_without_the_optimizer_it_is_whole_but_training_cannot_go_on(written, tmp_path, capsys):
    backend, checkpoint = written
    if backend not in LOST:
        pytest.skip("DeepSpeed keeps all in one folder")
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    lost = copy / LOST[backend]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert verify_checkpoint(copy) == {}
    with pytest.raises(CheckpointError, match=f"has no {LOST[backend]}, so training cannot go on"):
        check_resumable(copy)
    code, text = inspect(copy, capsys)
    assert code == 0 and f"resume no: without {LOST[backend]} (save_only_model?)" in text


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_in_a_folder_of_shards_is_run(tmp_path):
    folder = tmp_path / "optimizer_0"
    folder.mkdir()
    (folder / METADATA_NAME).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(CheckpointError, match="mkdir has no place in it"):
        read_metadata(folder)
    (folder / METADATA_NAME).unlink()
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save({"a": {"b": Trap(tmp_path / "trapped"), "c": 1}}, checkpoint_id=folder)
    with pytest.raises(CheckpointError, match="cannot be read in its a.b"):
        plain_values(folder)
    assert not (tmp_path / "trapped").exists()
