"""With `bf16=True` two processes train what one does, and FSDP2 reports losses that accelerate alone rounds to bf16.

Oracles: the run of one process; whether a loss lies on the grid of bf16; the losses of the same run under DDP.
"""

import pytest
import tiny
from processes import harness
from transformers import Trainer

# By how much the weights may differ, as a share of the distance they went. DDP computes as one process does. FSDP2
# computes in bf16, of 8 bits, also what autocast leaves in float32: 0.5 to 0.7 % measured. ZeRO adds up gradients in
# bf16: 2.6 to 3.4 %.
APART = {"ddp": 0.0, "fsdp2": 0.015, "zero2": 0.07, "zero3": 0.07}
ODD = {"vocab_size": 67, "intermediate_size": 45, "attention_dropout": 0.0}


def train(folder, backend):
    """Losses, training and evaluation weights after ten steps with each of two methods; and upstream's losses."""
    options = {"max_steps": 10, "per_device_train_batch_size": 2, "bf16": True, "dataloader_pin_memory": False}
    options |= {"gradient_accumulation_steps": 2} if backend == "one" else {}
    options |= {"logging_strategy": "steps", "logging_steps": 1} | harness.arguments(backend)
    found = {}
    if backend == "fsdp2":  # first, with nothing of this package
        arguments = tiny.stock_arguments(folder, **options | {"optim": "adamw_torch", "max_steps": 3})
        data = {"train_dataset": tiny.TRAIN, "eval_dataset": tiny.EVAL}
        trainer = Trainer(tiny.llama(**ODD), arguments, **data)
        trainer.train()
        found["upstream"] = (losses(trainer),)
    for method in ("ewa", "schedule_free"):
        trainer = tiny.trainer(folder / method, tiny.llama(**ODD), **options | tiny.METHODS[method])
        trainer.train()
        assert harness.is_really(trainer, backend)
        weights = [harness.gathered(trainer)]
        with trainer.evaluation_weights():
            weights.append(harness.gathered(trainer))
        floats = [{name: value.float() for name, value in kind.items()} for kind in weights]
        found[method] = losses(trainer), *floats
    return found


def losses(trainer):
    """Of the training, and of an evaluation."""
    return [e["loss"] for e in trainer.state.log_history if "loss" in e] + [trainer.evaluate()["eval_loss"]]


def distance(one, other):
    return sum((one[name] - other[name]).double().square().sum() for name in one).sqrt()


def rounded(loss):
    """Whether this may be the mean of two numbers of bf16, which between 2 and 8 are multiples of 1/64 or more."""
    assert 2 < loss < 8
    return loss % 2**-7 == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process."""
    return harness.run(train, tmp_path_factory.mktemp("alone"), "one", backend="one")[0]


@pytest.mark.parametrize("backend", APART)
def test_two_processes_train_what_one_does(tmp_path, alone, backend):
    if harness.missing(backend):
        pytest.skip(harness.missing(backend))
    start = dict(tiny.llama(**ODD).named_parameters())
    for found in harness.run(train, tmp_path, backend, backend=backend):
        for method, (expected, *weights) in alone.items():
            # layers in bf16 under FSDP2: of a loss of 4 they keep steps of 0.016
            assert found[method][0] == pytest.approx(expected, abs=5e-3 if APART[backend] else 1e-6), method
            for weight, other in zip(weights, found[method][1:], strict=True):
                assert distance(weight, other) <= APART[backend] * distance(weight, start), method
            assert not any(rounded(loss) for loss in found[method][0])
        if backend == "fsdp2":  # remove the workaround for it when this fails
            assert all(rounded(loss) for loss in found["upstream"][0])
