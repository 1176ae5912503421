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


LOST = {"fsdp2": "optimizer.bin", "fsdp2_sharded": "optimizer_0"}


def test_without_the_optimizer_it_is_whole_but_training_cannot_go_on(written, tmp_path, capsys):
    backend, checkpoint = written
    if backend not in LOST:
        pytest.skip("DeepSpeed keeps all in one folder")
    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    lost = copy / LOST[backend]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert verify_checkpoint(copy) == {}
    with pytest.raises(CheckpointError, match=f"has no {LOST[backend]}, so it cannot be resumed"):
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
