"""The optimizer's state is loaded from another layout; the oracle is torch's own state dict."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hf_radam import RAdamScheduleFree
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.optimizer_state import load_optimizer, read_groups

OPTIMIZERS = {"radam": torch.optim.RAdam, "schedule_free": RAdamScheduleFree}


def made(optimizer_class, steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    model.add_module("_checkpoint_wrapped_module", torch.nn.Linear(5, 2))
    model[1].weight.requires_grad_(False)
    last = list(model[2].parameters())
    groups = [{"params": [model[1].bias, model[0].weight], "lr": 0.1}, {"params": [model[0].bias, *last], "lr": 0.2}]
    optimizer = optimizer_class(groups)
    if steps and optimizer_class is RAdamScheduleFree:
        optimizer.train()
    for _ in range(steps):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("layout", ["optimizer.pt", "optimizer.bin"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_bit_is_loaded(tmp_path, kind, layout):
    """By numbers (one process, DDP) and by names (FSDP2), into a new optimizer."""
    model, optimizer = made(OPTIMIZERS[kind], steps=3)
    expected = copy.deepcopy(optimizer.state_dict())
    saved = expected if layout == "optimizer.pt" else get_optimizer_state_dict(model, optimizer)
    torch.save(saved, tmp_path / layout)
    other_model, other = made(OPTIMIZERS[kind], steps=0)
    before = copy.deepcopy(other_model.state_dict())
    load_optimizer(other, other_model, str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in other_model.state_dict().items())
    loaded = other.state_dict()
    assert loaded["param_groups"] == expected["param_groups"] and loaded["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert loaded["state"][number].keys() == state.keys()
        assert all(torch.equal(loaded["state"][number][key], value) for key, value in state.items())
    assert [group["lr"] for group in read_groups(tmp_path)] == [0.1, 0.2]


def test_another_optimizer_is_refused(tmp_path):
    model, optimizer = made(torch.optim.RAdam, steps=1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    smaller = torch.optim.RAdam([{"params": [model[1].bias]}, {"params": [model[0].bias]}])
    with pytest.raises(CheckpointError, match=r"groups of \[2, 3\] parameters, this one of \[1, 1\]"):
        load_optimizer(smaller, model, str(tmp_path))
    (tmp_path / "optimizer.pt").unlink()
    torch.save(get_optimizer_state_dict(model, optimizer), tmp_path / "optimizer.bin")
    other = torch.optim.RAdam([{"params": [model[1].bias, model[1].weight]}, {"params": [model[0].bias]}])
    with pytest.raises(CheckpointError, match=r"only saved: \['0.weight', .*only here: \['1.weight'\]"):
        load_optimizer(other, model, str(tmp_path))
