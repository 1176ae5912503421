"""The optimizer's state by numbers and by names, and back; oracle: torch's own state dict."""

import pytest
import torch

from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.optimizer_states import by_name, by_number, names_by_group


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    model[1].weight.requires_grad_(False)
    groups = [{"params": [model[1].bias, model[0].weight], "lr": 0.1}, {"params": [model[0].bias], "lr": 0.2}]
    optimizer = torch.optim.RAdam(groups)
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_there_and_back_is_the_same(trained):
    model, optimizer = trained
    names = names_by_group(optimizer.param_groups, model)
    assert names == [["1.bias", "0.weight"], ["0.bias"]]
    named = by_name(optimizer.state_dict(), names)
    assert named["state"].keys() == {"0.weight", "0.bias", "1.bias"}
    assert named["state"]["0.weight"]["exp_avg"] is optimizer.state[model[0].weight]["exp_avg"]
    assert [(group["params"], group["lr"]) for group in named["param_groups"]] == [(names[0], 0.1), (names[1], 0.2)]
    assert by_number(named, names) == optimizer.state_dict()


def test_another_order_of_the_names_is_followed(trained):
    model, optimizer = trained
    names = names_by_group(optimizer.param_groups, model)
    named = by_name(optimizer.state_dict(), names)
    turned = by_number(named, [["0.weight", "1.bias"], ["0.bias"]])
    assert turned["param_groups"][0]["params"] == [0, 1]
    assert turned["state"][0] is named["state"]["0.weight"] and turned["state"][1] is named["state"]["1.bias"]


def test_a_parameter_without_a_state_stays_so(trained):
    model, optimizer = trained
    del optimizer.state[model[0].weight]
    names = names_by_group(optimizer.param_groups, model)
    assert by_number(by_name(optimizer.state_dict(), names), names)["state"].keys() == {0, 2}


def test_names_are_those_of_the_model_without_wrappers():
    model = torch.nn.Sequential()
    model.add_module("_checkpoint_wrapped_module", torch.nn.Linear(2, 2))
    (group,) = torch.optim.SGD(model.parameters()).param_groups
    assert names_by_group([group], model) == [["weight", "bias"]]


def test_another_optimizer_is_refused(trained):
    model, optimizer = trained
    names = names_by_group(optimizer.param_groups, model)
    with pytest.raises(CheckpointError, match=r"groups of \[2, 1\] parameters, this one of \[1, 1\]"):
        by_name(optimizer.state_dict(), [["1.bias"], ["0.bias"]])
    named = by_name(optimizer.state_dict(), names)
    with pytest.raises(CheckpointError, match=r"only saved: \['0.weight'\], only here: \['9.weight'\]"):
        by_number(named, [["1.bias", "9.weight"], ["0.bias"]])
