"""Ranks that were started differently: the same error on each of them, naming the flag and its values, and no hang.

Oracle: what each rank was given here.
"""

import os

import pytest
import tiny
import torch
from processes import harness
from transformers import Trainer

from hf_radam.trainer.ranks import check_agreement, describe_run, differences

# What ranks 0 and 1 are given (a model, data, or keywords), and what the error must say.
CASES = {
    "learning_rate": ({}, {"learning_rate": 0.02}, "learning_rate: 0.01 on rank 0, 0.02 on rank 1"),
    "nested": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        "lr_scheduler_kwargs: {'power': 1.0} on rank 0, {'power': 2.0} on rank 1",
    ),
    "shape": (
        {"model": {"intermediate_size": 48}},
        {"model": {"intermediate_size": 64}},
        "parameter model.layers.0.mlp.gate_proj.weight: (48, 32) float32 on rank 0, (64, 32) float32 on rank 1",
    ),
    "frozen": (
        {"frozen": True},
        {},
        "parameter model.embed_tokens.weight: (64, 32) float32, frozen on rank 0, (64, 32) float32 on rank 1",
    ),
    "dtype": (
        {"dtype": torch.bfloat16},
        {},
        "parameter model.embed_tokens.weight: (64, 32) bfloat16 on rank 0, (64, 32) float32 on rank 1",
    ),
    "data": ({}, {"samples": 60}, "length of train_dataset: 64 on rank 0, 60 on rank 1"),
    "sets": ({"sets": 16}, {"sets": 12}, "length of eval_dataset a: 16 on rank 0, 12 on rank 1"),
    "function": ({"metrics": tiny.loss_of}, {}, "compute_metrics: loss_of on rank 0, NoneType on rank 1"),
    "optimizer": ({"passed": 0.1}, {"passed": 0.2}, "optimizer lr: 0.1 on rank 0, 0.2 on rank 1"),
    "nothing": ({"run_name": "first", "dataloader_num_workers": 2}, {"log_level": "info"}, None),
}


OF_TRAINING = {
    "a method": ({"ewa": True}, {"optim": "radam_schedulefree"}, "ewa: True on rank 0, False on rank 1"),
    "resuming": (
        {"ewa": True},
        {"ewa": True, "resume": True},
        "resume_from_checkpoint: None on rank 0, True on rank 1",
    ),
    "model": ({"ewa": True, "model": {"vocab_size": 70}}, {"ewa": True}, "lm_head.weight: (70, 32) float32 on rank 0"),
}
"""The same for `train()` with a method of this package."""


def trainer_for(
    folder, model=None, frozen=False, dtype=None, samples=64, sets=16, metrics=None, passed=None, **options
):
    trained = tiny.partly_frozen() if frozen else tiny.llama(**model or {})
    arguments = tiny.arguments(folder, **{"ddp_find_unused_parameters": False} | options)
    trained = trained if dtype is None else trained.to(dtype)
    optimizer = None if passed is None else torch.optim.SGD(trained.parameters(), lr=passed)
    data = {"train_dataset": tiny.TRAIN[:samples], "eval_dataset": {"a": tiny.EVAL[:sets]}}
    return Trainer(trained, arguments, **data, compute_metrics=metrics, optimizers=(optimizer, None))


def error_here(folder, by_rank):
    """What `check_agreement` raises on this rank for a trainer that is made of the rank's keywords."""
    trainer = trainer_for(folder, **by_rank[int(os.environ["RANK"])])
    try:
        check_agreement(trainer)
    except ValueError as error:
        return str(error)
    return None


def error_of_training(folder, by_rank):
    """What `train()` of `RAdamTrainer` raises on this rank."""
    options = {"ddp_find_unused_parameters": False} | by_rank[int(os.environ["RANK"])]
    resume = options.pop("resume", None)
    model = tiny.llama(**options.pop("model", {}))
    with pytest.raises(ValueError) as caught:
        tiny.trainer(folder, model, **options).train(resume_from_checkpoint=resume)
    return str(caught.value)


def errors_of_all(folder):
    found = {name: error_here(folder, case[:2]) for name, case in CASES.items()}
    return found | {name: error_of_training(folder, case[:2]) for name, case in OF_TRAINING.items()}


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    return harness.run(errors_of_all, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", [*CASES, *OF_TRAINING])
def test_every_rank_names_what_differs(under_ddp, name):
    here, there = (of_rank[name] for of_rank in under_ddp)
    assert here == there
    expected = (CASES | OF_TRAINING)[name][2]
    if expected is None:
        assert here is None
    else:
        assert here.startswith("The ranks of this run were started differently") and expected in here
        assert here.endswith("Start every rank with the same flags, model and data.")


def shapes(trainer):
    return {name: text for name, text in describe_run(trainer).items() if name.startswith("parameter ")}


def errors_and_shapes(folder, backend, other):
    """Errors for the same set-up, another model and rate, and another back-end; shapes once parameters are sharded."""
    options = harness.arguments(backend)
    wider = options | {"model": {"intermediate_size": 64}, "learning_rate": 0.02}
    cases = [[options, options], [options, wider], [options, harness.arguments(other)]]
    errors = [error_here(folder, case) for case in cases]
    trainer = trainer_for(folder, max_steps=1, model={"vocab_size": 65}, **options)
    trainer.train()
    check_agreement(trainer)
    assert harness.is_really(trainer, backend)
    return errors, shapes(trainer)


@pytest.mark.parametrize(
    ("backend", "other", "differs"),
    [
        (
            "fsdp2",
            "fsdp2_sharded",
            "StateDictType.FULL_STATE_DICT on rank 0, StateDictType.SHARDED_STATE_DICT on",
        ),
        ("zero3", "zero3_ungathered", "DeepSpeed zero_optimization: {"),
    ],
)
def test_under_other_backends(tmp_path, backend, other, differs):
    if reason := harness.missing(backend):
        pytest.skip(reason)
    here, there = harness.run(errors_and_shapes, tmp_path, backend, other, backend=backend)
    assert here == there
    (same, wider, elsewhere), found = here
    assert same is None and differs in elsewhere
    assert "learning_rate: 0.01 on rank 0, 0.02 on rank 1" in wider
    assert "gate_proj.weight: (48, 32) float32 on rank 0, (64, 32) float32 on rank 1" in wider
    assert found == shapes(trainer_for(tmp_path, model={"vocab_size": 65}))  # of the complete parameters


def test_one_process_agrees_with_itself(tmp_path):
    first, second = (trainer_for(tmp_path, metrics=lambda prediction: {}) for _ in range(2))
    assert describe_run(first) == describe_run(second) and "hub_token" not in describe_run(first)
    assert not [text for text in describe_run(first).values() if "0x" in text]  # the address of the lambda
    check_agreement(first)


def test_many_ranks_and_many_differences():
    by_rank = [{"a": "1", "b": "2"}] * 3 + [{"a": "2", "b": "2"}] + [{"a": "1", "b": "2"}]
    assert differences(by_rank) == ["a: 1 on rank 0 and 3 more, 2 on rank 3"]
    many = differences([{str(i): "x" for i in range(13)}, {}])
    assert len(many) == 11 and many[-1] == "and 3 more"
