"""Models too large for one process: memory while saving, loading shards, and consolidating them.

Oracles: the peak of resident memory, as the kernel counts it; the loss that the trainer reported; the folder's listing.
"""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from processes import harness
from transformers import AutoModelForCausalLM

from hf_radam import load_evaluation_model
from hf_radam.checkpoints import load, weights
from hf_radam.checkpoints.load import consolidate
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.sharded import is_sharded_alone
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.checkpoints.weights import load_model_shards
from hf_radam.cli import main
from hf_radam.sharding import Weights, find_sharding

MEGABYTE = 2**20
FILE = 20 * MEGABYTE
LARGE = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}


def reset_peak():
    """Return freed memory, and reset the peak of resident memory; returns what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory would be used again without being counted
    Path("/proc/self/clear_refs").write_text("5")
    return in_status("VmRSS")


def in_status(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peaks_of_saves(folder, file_size):
    """Return how much the memory of a process grows while it saves, and the bytes of the model in float32."""
    weights.MAX_FILE_BYTES = file_size
    trainer = tiny.trainer(folder, tiny.llama(**LARGE), **harness.arguments("fsdp2"), max_steps=1)
    trainer.train()
    assert harness.is_really(trainer, "fsdp2")
    sharding, peaks = trainer._evaluation.sharding, {}
    for kind, write in (("complete", weights.save_model_folder), ("sharded", weights.save_sharded_folder)):
        for name in ("first", "model"):  # the first loads modules, and all-gathers the ranges
            before = reset_peak()
            write(folder / kind / name, trainer._bare_model, Weights.of_model(sharding), processing_class=None)
        peaks[kind] = in_status("VmHWM") - before
    return peaks, sum(4 * sharding.shape(name).numel() for name in sharding.parameters)


def peaks_of_consolidating(source, folder, file_sizes):
    """Return how much the memory of a process grows while it consolidates into files of each size."""
    peaks = []
    for size in file_sizes:
        weights.MAX_FILE_BYTES = size
        for name in ("first", "second"):  # the first loads modules
            target = folder / f"{name} {size}"
            target.mkdir()
            before = reset_peak()
            load.write_consolidated(source, target)
        peaks.append(in_status("VmHWM") - before)
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="has the kernel count the peak anew")
def test_a_process_holds_one_file_of_the_model_at_most(tmp_path):
    """While it saves, complete or in shards, and while it consolidates."""
    for rank, (peaks, size) in enumerate(harness.run(peaks_of_saves, tmp_path, FILE, backend="fsdp2")):
        assert size > 12 * FILE
        # A file; and, whatever its size, 40 to 80 MB for rank 0, which gathers, and 20 for others.
        for kind, more in peaks.items():
            allowed = FILE + 110 * MEGABYTE if rank == 0 and kind == "complete" else 30 * MEGABYTE
            assert more < allowed, (rank, kind, more / MEGABYTE)
    source = tmp_path / "sharded" / "model"
    ((files, one_file),) = harness.run(peaks_of_consolidating, source, tmp_path, [FILE, 2**40], backend="one")
    assert files < FILE + 110 * MEGABYTE < size < one_file, (files, one_file)


# ---- Load and consolidate ----


def train_sharded(folder, method):
    args = harness.arguments("fsdp2_sharded") | {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    decay = {"decay_steps": 2} if method == "wsd" else {}
    trainer = tiny.trainer(folder, tiny.tied(), **args | tiny.METHODS[method] | decay)
    trainer.train()
    sharding = trainer._evaluation.sharding
    weights = {name: sharding.gather_model(name).clone() for name in sharding.parameters}
    if trainer.is_world_process_zero():
        torch.save(weights, folder / "training.pt")
    return trainer.evaluate()["eval_loss"]


@pytest.fixture(scope="module", params=["wsd", "schedule_free"])
def sharded(request, tmp_path_factory):
    """A run with all weights in shards, the loss it reported, and the folder of its evaluation weights."""
    folder = tmp_path_factory.mktemp(request.param)
    loss = harness.run(train_sharded, folder, request.param, backend="fsdp2_sharded")[0]
    return folder, loss, "" if request.param == "wsd" else request.param


@pytest.fixture
def checkpoint(sharded, tmp_path):
    shutil.copytree(sharded[0], tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path / "run" / "checkpoint-4"


def listing(folder):
    paths = [folder, *folder.rglob("*")]
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def load_after_a_barrier(checkpoint):
    harness.join_group()
    torch.distributed.barrier()
    return tiny.loss_of(load_evaluation_model(checkpoint))


def test_loading_writes_nothing_into_a_checkpoint(sharded, checkpoint):
    _, loss, beside = sharded
    assert is_sharded_alone(checkpoint / beside)
    before = listing(checkpoint.parent)
    model = load_evaluation_model(checkpoint)
    assert tiny.loss_of(model) == pytest.approx(loss, abs=1e-6) and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert harness.run(load_after_a_barrier, checkpoint) == pytest.approx([loss] * 2, abs=1e-6)
    assert listing(checkpoint.parent) == before


def test_the_command_consolidates_once(sharded, checkpoint, capsys):
    _, loss, beside = sharded
    before = checkpoint.stat().st_mtime_ns
    assert main(["consolidate", str(checkpoint)]) == 0
    assert capsys.readouterr().out.strip() == str(checkpoint / beside)
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(checkpoint / beside)) == pytest.approx(loss, abs=1e-6)
    assert main(["consolidate", str(checkpoint), "--training_weights"]) == 0
    trained = tiny.parameters(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert tiny.same(trained, torch.load(sharded[0] / "training.pt"))
    assert not verify_checkpoint(checkpoint) and not list(checkpoint.rglob(".consolidating-*"))
    file = checkpoint / beside / "model.safetensors"
    written = file.stat()
    assert checkpoint.stat().st_mtime_ns == before  # rotation goes by it
    assert main(["consolidate", str(checkpoint.parent)]) == 0 and file.stat() == written  # of a run, its newest
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert (Path(beside) / "model.safetensors").as_posix() in verify_checkpoint(checkpoint)


def test_damaged_shards_are_named(sharded, checkpoint, capsys):
    _, _, beside = sharded
    shard = checkpoint / beside / ("sharded" if beside else "pytorch_model_fsdp_0") / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="__1_0.distcp"):
        consolidate(checkpoint)
    with pytest.raises(CheckpointError, match="__1_0.distcp"):
        load_evaluation_model(checkpoint)
    assert main(["consolidate", str(checkpoint)]) == 1 and "__1_0.distcp" in capsys.readouterr().err


def test_shards_of_a_larger_model_are_refused(checkpoint):
    smaller = tiny.llama(tie_word_embeddings=True, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected \['model.layers.1."):
        load_model_shards(checkpoint, smaller, find_sharding(smaller))
