"""`recalibrate_batch_norm` against statistics computed directly from the activations."""

import pytest
import torch
from torch import nn

from hf_radam import recalibrate_batch_norm
from hf_radam.batch_norm import statistics, statistics_restored


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv1d(4, 3, 3)
    )


def batches(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 2, 10, generator=generator) for _ in range(count)]


def test_statistics_are_the_means_of_the_batch_statistics():
    model = network()
    model(torch.randn(6, 2, 10) + 5)  # stale statistics
    assert recalibrate_batch_norm(model, batches()) == 5
    activations = [model[0](batch).detach().double() for batch in batches()]
    mean = torch.stack([a.mean((0, 2)) for a in activations]).mean(0)
    variance = torch.stack([a.var((0, 2), unbiased=True) for a in activations]).mean(0)
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)


def test_modes_momentum_and_gradients_are_left_alone_and_dropout_is_off():
    model = network()
    model[4].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model[3].register_forward_hook(
        lambda _, args, output: seen.append(torch.equal(args[0], output) and not output.requires_grad)
    )
    recalibrate_batch_norm(model, batches())
    handle.remove()
    assert seen == [True] * 5
    assert [module.training for module in model.modules()] == modes and model[1].momentum == 0.3


def test_the_old_statistics_come_back_after_the_context_and_after_an_exception():
    model = network()
    model(torch.randn(6, 2, 10) + 5)
    before = statistics(model)
    with statistics_restored(model):
        recalibrate_batch_norm(model, batches())
        assert not torch.equal(model[1].running_mean, before[0])
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
    for given, error, message in (
        ([], ValueError, "at least one batch"),
        ([*batches(1), torch.ones(2, 7, 10)], RuntimeError, "weight"),
    ):
        with pytest.raises(error, match=message):
            recalibrate_batch_norm(model, given)
        assert all(torch.equal(a, b) for a, b in zip(statistics(model), before, strict=True))
        assert model.training and model[1].momentum == 0.3


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})
    model["unused"].running_mean.fill_(7.0)
    recalibrate_batch_norm(model, [torch.randn(8, 2)], forward=lambda m, batch: m["used"](batch))
    assert torch.equal(model["unused"].running_mean, torch.full((2,), 7.0))
    assert model["used"].num_batches_tracked == 1


def test_without_batch_norm_no_batch_is_drawn():
    given = iter(batches())
    assert recalibrate_batch_norm(nn.Linear(1, 1), given) == 0 and len([*given]) == 5


def test_batches_as_mappings_and_tuples():
    class Sum(nn.BatchNorm1d):
        def forward(self, a, b):
            return super().forward(a + b)

    model, x = Sum(2), torch.randn(8, 2)
    recalibrate_batch_norm(model, [{"a": x, "b": x}])
    by_name = statistics(model)
    recalibrate_batch_norm(model, [(x, x)])
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), by_name, strict=True))
    torch.testing.assert_close(by_name[0], (2 * x).mean(0))
