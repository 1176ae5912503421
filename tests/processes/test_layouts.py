"""The files of a checkpoint tell its layout and who wrote it; nothing in them is executed.

The checkpoints are of stock `Trainer`. Oracles: the back-end that was asked for, and a trap that would show.
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

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.layouts import DEEPSPEED, FSDP_FULL, FSDP_SHARDED, layout_of, process_count, zero_stages
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.runs import check_resumable
from hf_radam.checkpoints.sharded import METADATA_NAME, read_metadata, read_tree
from hf_radam.checkpoints.verify import verify_checkpoint

EXPECTED = {"fsdp2": FSDP_FULL, "fsdp2_sharded": FSDP_SHARDED, "zero2": DEEPSPEED, "zero3_ungathered": DEEPSPEED}
STEP = 2


def write(folder, backend):
    options = {"max_steps": STEP + 1, "save_strategy": "steps", "save_steps": STEP, "optim": "adamw_torch"}
    arguments = tiny.stock_arguments(folder, **options | harness.arguments(backend))
    Trainer(tiny.llama(), arguments, train_dataset=tiny.TRAIN).train()


@pytest.mark.parametrize("backend", EXPECTED)
def test_the_layout_is_recognized_and_its_optimizer_needed(tmp_path, backend, capsys):
    if reason := harness.missing(backend):
        pytest.skip(reason)
    harness.run(write, tmp_path, backend, backend=backend)
    checkpoint = tmp_path / f"checkpoint-{STEP}"
    layout = layout_of(checkpoint)
    assert (layout, process_count(checkpoint), verify_checkpoint(checkpoint)) == (EXPECTED[backend], 2, {})
    check_resumable(checkpoint)
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and f"layout {layout.words}, written by 2 processes" in text
    if backend in ("fsdp2_sharded", "zero3_ungathered"):  # without a configuration
        with pytest.raises(CheckpointError, match="model.safetensors is missing: the weights lie in .*/, in shards"):
            load_evaluation_model(checkpoint)
    else:
        load_evaluation_model(checkpoint)
    if layout is DEEPSPEED:  # which has everything in one folder
        assert zero_stages(checkpoint) == ((1, 2) if backend == "zero2" else (3,))
        return
    lost = checkpoint / layout.optimizer
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert verify_checkpoint(checkpoint) == {}
    with pytest.raises(CheckpointError, match=f"has no {lost.name}"):
        check_resumable(checkpoint)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_in_a_folder_of_shards_is_executed(tmp_path):
    folder = tmp_path / "optimizer_0"
    folder.mkdir()
    (folder / METADATA_NAME).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(CheckpointError, match="mkdir is not allowed in it"):
        read_metadata(folder)
    (folder / METADATA_NAME).unlink()
    tree = {"a": {"b": Trap(tmp_path / "trapped"), "c": 1}, "d": torch.ones(2)}
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.save(tree, checkpoint_id=folder)
    for tensors in (False, True):
        with pytest.raises(CheckpointError, match="optimizer_0 cannot be read"):
            read_tree(folder, tensors=tensors)
    assert not (tmp_path / "trapped").exists()
