"""Processes that were started differently: the same error on each of them, naming the flag and its values, and no hang.

Oracle: what each process was given here.
"""

import functools
import os

import pytest
import tiny
import torch
from processes import harness
from transformers import Trainer
from transformers.trainer_utils import EvalPrediction

from hf_radam.trainer import ranks as agreement
from hf_radam.trainer.ranks import check_agreement


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {}


# What the processes 0 and 1 are given (a model, data, or keywords), and what the error must say.
CASES = {
    "learning_rate": ({}, {"learning_rate": 0.02}, "learning_rate: 0.01 on rank 0, 0.02 on rank 1"),
    "ewa": ({"ewa": True}, {}, "ewa: True on rank 0, False on rank 1"),
    "max_steps": ({}, {"max_steps": 19}, "max_steps: 20 on rank 0, 19 on rank 1"),
    "optim": ({"optim": "radam"}, {}, "optim: radam on rank 0, adamw_torch_fused on rank 1"),
    "budgets": (
        {"lr_scheduler_type": "wsd_s", "budgets": [10]},
        {"lr_scheduler_type": "wsd_s", "budgets": [11]},
        "budgets: [10] on rank 0, [11] on rank 1",
    ),
    "output_dir": ({"output_dir": "/a"}, {"output_dir": "/b"}, "output_dir: /a on rank 0, /b on rank 1"),
    "nested": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 0.0}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}},
        "lr_scheduler_kwargs.power: 1.0 on rank 0, 2.0 on rank 1",
    ),
    "shape": (
        {"model": {"intermediate_size": 48}},
        {"model": {"intermediate_size": 64}},
        "parameter model.layers.0.mlp.gate_proj.weight: (48, 32) float32 on rank 0, (64, 32) float32 on rank 1",
    ),
    "layers": (
        {"model": {"num_hidden_layers": 1}},
        {},
        "parameter model.layers.1.self_attn.q_proj.weight: absent on rank 0, (32, 32) float32 on rank 1",
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
    "metrics": (
        {"metrics": accuracy},
        {},
        "compute_metrics: test_agreement.accuracy on rank 0, None on rank 1",
    ),
    "nothing": (
        {"run_name": "first", "disable_tqdm": False, "dataloader_num_workers": 2},
        {"log_level": "info"},
        None,
    ),
}


def trainer_for(folder, model=None, frozen=False, dtype=None, samples=64, metrics=None, **options):
    trained = tiny.partly_frozen() if frozen else tiny.llama(**model or {})
    arguments = tiny.arguments(folder, **{"ddp_find_unused_parameters": False} | options)
    return Trainer(
        trained if dtype is None else trained.to(dtype),
        arguments,
        train_dataset=tiny.TRAIN[:samples],
        compute_metrics=metrics,
        callbacks=[],
    )


def told(folder, by_rank):
    """What `check_agreement` says here of a trainer that is made of this rank's keywords."""
    trainer = trainer_for(folder, **by_rank[int(os.environ["RANK"])])
    try:
        check_agreement(trainer)
    except ValueError as error:
        return str(error)
    return None


def told_of_all(folder):
    return {name: told(folder, case[:2]) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    return harness.run(told_of_all, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", CASES)
def test_every_process_tells_the_same_of_what_differs(under_ddp, name):
    here, there = (each[name] for each in under_ddp)
    assert here == there
    expected = CASES[name][2]
    if expected is None:
        assert here is None
    else:
        assert here.startswith("The processes of this run do not agree on what to train") and expected in here
        assert here.endswith("Start every process with the same flags, model and data.")


@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero3"])
def test_under_other_backends(tmp_path, backend):
    if reason := harness.missing(backend):
        pytest.skip(reason)
    options = harness.arguments(backend)
    assert harness.run(told, tmp_path, [options, options], backend=backend) == [None, None]
    wider = options | {"model": {"intermediate_size": 64}, "learning_rate": 0.02}
    here, there = harness.run(told, tmp_path, [options, wider], backend=backend)
    assert here == there
    assert "learning_rate: 0.01 on rank 0, 0.02 on rank 1" in here
    assert "gate_proj.weight: (48, 32) float32 on rank 0, (64, 32) float32 on rank 1" in here


def test_backends_that_differ(tmp_path):
    full, sharded = harness.arguments("fsdp2"), harness.arguments("fsdp2_sharded")
    here, there = harness.run(told, tmp_path, [full, sharded], backend="fsdp2")
    assert here == there and "state_dict_type: FULL_STATE_DICT on rank 0, SHARDED_STATE_DICT on rank 1" in here


def shapes_after_training(folder, backend):
    trainer = trainer_for(folder, max_steps=1, model={"vocab_size": 65}, **harness.arguments(backend))
    trainer.train()
    check_agreement(trainer)
    assert harness.is_really(trainer, backend)
    return agreement.parameters(trainer.model)


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_sharded_parameters_have_their_whole_shape(tmp_path, backend):
    if reason := harness.missing(backend):
        pytest.skip(reason)
    whole = agreement.parameters(tiny.llama(vocab_size=65))
    assert harness.run(shapes_after_training, tmp_path, backend, backend=backend) == [whole, whole]


def told_by_training(folder, by_rank):
    """What `train()` of our trainer raises here."""
    options = {"ddp_find_unused_parameters": False} | by_rank[int(os.environ["RANK"])]
    resume = options.pop("resume", None)
    model = tiny.llama(**options.pop("model", {}))
    with pytest.raises(ValueError) as caught:
        tiny.trainer(folder, model, **options).train(resume_from_checkpoint=resume)
    return str(caught.value)


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ({"ewa": True}, {}, "ewa: True on rank 0, False on rank 1"),
        ({"optim": "radam"}, {"optim": "radam_schedulefree"}, "optim: radam on rank 0, radam_schedulefree on rank 1"),
        ({"ewa": True}, {"ewa": True, "resume": True}, "resume_from_checkpoint: None on rank 0, True on rank 1"),
        ({"ewa": True, "model": {"vocab_size": 70}}, {"ewa": True}, "lm_head.weight: (70, 32) float32 on rank 0"),
    ],
    ids=["a method on one", "optim", "resuming", "model"],
)
def test_training_does_not_begin(tmp_path, here, there, said):
    each = harness.run(told_by_training, tmp_path, [here, there])
    assert each[0] == each[1] and said in each[0]


def test_one_process_agrees_with_itself(tmp_path):
    check_agreement(trainer_for(tmp_path))


def test_words_are_the_same_in_every_process(tmp_path):
    first, second = (agreement.described(trainer_for(tmp_path)) for _ in range(2))
    assert first == second and not [text for text in first.values() if "0x" in text]
    assert first["data_collator"] == "transformers.data.data_collator.default_data_collator"
    assert "hub_token" not in first
    odd = {"a": functools.partial(accuracy, b={"z", "a"}), "b": {"c": torch.float16, "d": {}}, "e": object()}
    assert dict(agreement._flat("", odd)) == {
        "a": "partial(test_agreement.accuracy, [], {b: [a, z]})",
        "b.c": "float16",
        "b.d": "{}",
        "e": "builtins.object",
    }


def test_many_ranks_and_many_differences():
    by_rank = [{"a": "1", "b": "2"}] * 3 + [{"a": "2", "b": "2"}] + [{"a": "1", "b": "2"}]
    assert agreement.differences(by_rank) == ["a: 1 on ranks 0-2, 4, 2 on rank 3"]
    many = [{str(i): "x" for i in range(13)}, {}]
    assert len(agreement.differences(many)) == 11 and agreement.differences(many)[-1] == "and 3 more"
