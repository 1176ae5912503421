"""Weights are written tensor by tensor: the same files as upstream's. `processes/test_large_models.py` counts memory.

Oracles: the bytes that `save_pretrained` writes, and what `from_pretrained` reads.
"""

import pytest
import safetensors.torch
import tiny
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hf_radam.checkpoints import weights
from hf_radam.checkpoints.weights import Tensors, model_tensors, save_model_folder, write_weights
from hf_radam.sharding import LocalSharding, Weights

MODELS = {"llama": tiny.llama, "tied": tiny.tied, "mixtral": tiny.mixtral, "bf16": tiny.bf16, "float64": tiny.float64}


def weights_of(model):
    return Weights.of_model(LocalSharding(model.named_parameters(), modules=model.modules()))


@pytest.mark.parametrize("kind", MODELS)
def test_the_files_are_those_of_upstream_and_several_hold_the_same_model(tmp_path, monkeypatch, kind):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "stock")
    save_model_folder(tmp_path / "folder", model, weights_of(model), processing_class=None, in_float32=False)
    stock, folder = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("stock", "folder"))
    assert folder == stock
    (tmp_path / "folder" / "model.safetensors").unlink()
    tensors = model_tensors(model, weights_of(model), in_float32=False)
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 20_000)
    write_weights(tmp_path / "folder", model, tensors, writes=True)
    files = sorted((tmp_path / "folder").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = max(value.numel() * value.element_size() for value in model.state_dict().values())
    assert max(file.stat().st_size for file in files) < max(20_000, largest) + 4000
    loaded = type(model).from_pretrained(tmp_path / "folder", dtype=model.dtype)
    assert tiny.same(tiny.parameters(loaded), tiny.parameters(model))


def test_a_full_disk_is_reported_after_the_last_tensor_was_gathered(tmp_path, monkeypatch):
    model = tiny.llama()
    tensors = model_tensors(model, weights_of(model), in_float32=False)
    gathered = []

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 20_000)
    watched = Tensors(tensors.like, lambda key: gathered.append(key) or tensors.read(key))
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, model, watched, writes=True)
    assert gathered == list(tensors.like)  # the other ranks take part in every one


def test_a_model_that_is_no_pretrained_model_keeps_its_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    save_model_folder(tmp_path, model, weights_of(model), processing_class=None)
    assert tiny.same(safetensors.torch.load_file(tmp_path / "model.safetensors"), model.state_dict())


def test_parameters_sharded_by_columns_are_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        columns = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(1)], run_check=False))
        with pytest.raises(ValueError, match="no tensor parallelism"):
            LocalSharding([("w", columns)])
    finally:
        torch.distributed.destroy_process_group()
