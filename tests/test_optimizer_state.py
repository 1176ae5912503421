"""The state of another optimizer is refused. `processes/test_moving.py` loads every layout bit for bit."""

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.optimizer_state import load_optimizer


def test_another_optimizer_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    model[1].weight.requires_grad_(False)

    def optimizer_of(*groups):
        return torch.optim.RAdam([{"params": group} for group in groups])

    optimizer = optimizer_of([model[1].bias, model[0].weight], [model[0].bias])
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"groups of \[2, 1\] parameters, this one of \[1, 1\]"):
        load_optimizer(optimizer_of([model[1].bias], [model[0].bias]), model, str(tmp_path))
    (tmp_path / "optimizer.pt").unlink()
    torch.save(get_optimizer_state_dict(model, optimizer), tmp_path / "optimizer.bin")
    other = optimizer_of([model[1].bias, model[1].weight], [model[0].bias])
    with pytest.raises(CheckpointError, match=r"only saved: \['0.weight'\].*only here: \['1.weight'\]"):
        load_optimizer(other, model, str(tmp_path))
