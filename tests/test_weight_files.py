"""Weights written tensor by tensor: the same files as upstream's, never more than one of them in memory.

Oracles: the bytes that `save_pretrained` writes, and what `from_pretrained` reads.
"""

import weakref

import pytest
import safetensors.torch
import tiny
import torch
from torch import nn

from hf_radam.checkpoints.models import weight_files
from hf_radam.checkpoints.models.model_folders import save_model_folder, state_tensors
from hf_radam.sharding import LocalSharding, Weights
from hf_radam.sharding.local import equal_slice

MODELS = {"llama": tiny.llama, "tied": tiny.tied, "mixtral": tiny.mixtral, "bf16": tiny.bf16, "float64": tiny.float64}


def weights_of(model):
    return Weights.of_model(LocalSharding(model.named_parameters(), modules=model.modules()))


@pytest.mark.parametrize("kind", MODELS)
def test_the_file_is_the_one_that_upstream_writes(tmp_path, kind):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "stock")
    save_model_folder(tmp_path / "ours", model, weights_of(model), processing_class=None, in_float32=False)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "stock").iterdir()
    )
    for file in (tmp_path / "stock").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", MODELS)
def test_many_files_hold_the_same_model(tmp_path, kind, monkeypatch):
    model = MODELS[kind]()
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 20_000)
    tensors = state_tensors(model, weights_of(model), in_float32=False)
    model.config.save_pretrained(tmp_path)
    weight_files.write_weights(tmp_path, model, tensors, writes=True, max_bytes=20_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(value.numel() * value.element_size() for value in model.state_dict().values())
    if kind != "mixtral":  # of which a layer is brought at once
        assert max(file.stat().st_size for file in files) < max(20_000, largest) + 4000
    loaded = type(model).from_pretrained(tmp_path, dtype=model.dtype)
    assert tiny.same(tiny.parameters(loaded), tiny.parameters(model))


def test_one_file_at_a_time_is_in_memory(tmp_path):
    model = tiny.llama()
    plain = state_tensors(model, weights_of(model), in_float32=False)
    alive = most = 0

    def gone(size):
        nonlocal alive
        alive -= size

    def read(key):
        nonlocal alive, most
        brought = plain.read(key).clone()
        alive += brought.nbytes
        weakref.finalize(brought, gone, brought.nbytes)
        most = max(most, alive)
        return brought

    weight_files.write_weights(tmp_path, model, weight_files.Tensors(plain.like, read), writes=True, max_bytes=20_000)
    largest = 64 * 32 * 4
    assert largest < most <= 20_000 + largest < model.num_parameters() * 4 / 3  # a file, and one tensor more


def test_a_disk_that_is_full_is_told_when_all_was_brought(tmp_path, monkeypatch):
    model = tiny.llama()
    tensors = state_tensors(model, weights_of(model), in_float32=False)
    brought = []

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    watched = weight_files.Tensors(tensors.like, lambda key: brought.append(key) or tensors.read(key))
    with pytest.raises(OSError, match="No space left"):
        weight_files.write_weights(tmp_path, model, watched, writes=True, max_bytes=20_000)
    assert brought == list(tensors.like)  # the other processes took part in every one


def test_a_model_of_ones_own_has_its_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    save_model_folder(tmp_path, model, weights_of(model), processing_class=None)
    assert tiny.same(safetensors.torch.load_file(tmp_path / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize(("numel", "ranks"), [(7, 2), (1, 4), (64, 8), (9, 4), (0, 3)])
def test_shares_cover_everything_once_and_evenly(numel, ranks):
    shares = [equal_slice(numel, index, ranks) for index in range(ranks)]
    assert [i for first, length in shares for i in range(first, first + length)] == list(range(numel))
    assert max(length for _, length in shares) == -(-numel // ranks)


def test_parameters_sharded_by_columns_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        columns = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(1)], run_check=False))
        with pytest.raises(ValueError, match="no tensor parallelism"):
            LocalSharding([("w", columns)])
    finally:
        torch.distributed.destroy_process_group()
