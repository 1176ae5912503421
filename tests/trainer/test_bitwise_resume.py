"""A run with options that users combine, interrupted and resumed twice, is the uninterrupted run, bit for bit.

Under these a resume could go wrong: mixed precision, recomputed activations, streams, save steps that do not divide an
epoch or an averaging.
"""

import pytest
import tiny
import torch
from transformers import TrainingArguments

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.manifest import CheckpointError

# The flag's name since transformers 5.2x; the older one is deprecated there.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
RECOMPUTE = next(name for name in NAMES if name in TrainingArguments.__dataclass_fields__)
MIXED = {"bf16": True, RECOMPUTE: True, "gradient_accumulation_steps": 3}

OPTIONS = {
    "bf16, checkpointed activations, accumulation": ("wsd_s", MIXED),
    "the same, schedule-free": ("schedule_free_ewa", MIXED),
    "short last batch": ("wsd_s", {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}),
    "epochs": ("schedule_free_ewa", {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}),
    "grouped by length": ("wsd_s", {"train_sampling_strategy": "group_by_length"}),
    "unfused, with the states of callbacks": (
        "wsd_s",
        {"fused_optimizer": "false", "restore_callback_states_from_checkpoint": True},
    ),
    "label smoothing, noise, clipping": (
        "schedule_free_ewa",
        {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "max_grad_norm": 0.1},
    ),
}


class Stream(torch.utils.data.IterableDataset):
    """Data without a length: an epoch has 16 steps of two batches of 4 sequences."""

    def __iter__(self):
        return iter(tiny.TRAIN * 2)


def with_data(folder, options, *, until=None, resume=None, data=tiny.TRAIN):
    args = tiny.arguments(folder, **{"save_strategy": "steps", "save_steps": 3} | options)
    trainer = RAdamTrainer(tiny.llama(), args, train_dataset=data)
    if until is not None:
        trainer.add_callback(tiny.StopAfter(until))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_twice_resumed_is_the_whole(tmp_path, options, data=tiny.TRAIN):
    whole = with_data(tmp_path / "whole", options, data=data)
    with_data(tmp_path / "parts", options, until=8 if options.get("save_strategy") != "epoch" else 17, data=data)
    with_data(tmp_path / "parts", options, until=17, resume=True, data=data)
    resumed = with_data(tmp_path / "parts", options, resume=True, data=data)
    assert resumed.state.global_step == whole.state.global_step
    assert tiny.same(tiny.state(whole), tiny.state(resumed))


@pytest.mark.parametrize(("method", "extra"), OPTIONS.values(), ids=OPTIONS)
def test_resumed_twice(tmp_path, caplog, method, extra):
    assert_twice_resumed_is_the_whole(tmp_path, tiny.METHODS[method] | {"ewa": True, "ewa_every": 4} | extra)
    assert "is at epoch" not in caplog.text  # the warning of another place in the data
    assert "callbacks not included" not in caplog.text  # upstream's of our mark in the states of callbacks


def test_a_stream_is_resumed_in_its_first_epoch_and_refused_later(tmp_path):
    options = tiny.METHODS["schedule_free_ewa"] | {"gradient_accumulation_steps": 2}
    assert_twice_resumed_is_the_whole(tmp_path, options, Stream())
    with pytest.raises(CheckpointError, match="is in epoch 2 of a train_dataset without a length"):
        with_data(tmp_path / "late", options, resume=str(tmp_path / "whole/checkpoint-18"), data=Stream())
