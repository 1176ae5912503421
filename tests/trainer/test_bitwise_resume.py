"""A run with options that users combine, interrupted and resumed twice, is the uninterrupted run, bit for bit.

Each twin differs from the plain run of `test_inert_and_resume.py` in one or more options under which a resume could go
wrong: mixed precision, recomputed activations, streams, save steps that do not divide an epoch or an averaging.
"""

import pytest
import tiny
import torch
from transformers import TrainingArguments

from hf_radam import RAdamTrainer

# The flag's name since transformers 5.2x; the older one is deprecated there.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
RECOMPUTE = next(name for name in NAMES if name in TrainingArguments.__dataclass_fields__)

OPTIONS = {
    "bf16": {"bf16": True},
    "checkpointed activations": {RECOMPUTE: True},
    "bf16, checkpointed activations, accumulation": {
        "bf16": True,
        RECOMPUTE: True,
        "gradient_accumulation_steps": 3,
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "short last batch": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "label smoothing, noise, clipping": {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5, "max_grad_norm": 0.1},
}


class Stream(torch.utils.data.IterableDataset):
    """Data without a length, that never ends."""

    def __iter__(self):
        while True:
            yield from tiny.TRAIN


def run(folder, options, *, until=None, resume=None, data=tiny.TRAIN):
    args = tiny.arguments(folder, **{"save_strategy": "steps", "save_steps": 3} | options)
    trainer = RAdamTrainer(tiny.llama(), args, train_dataset=data)
    if until is not None:
        trainer.add_callback(tiny.StopAfter(until))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_twice_resumed_is_the_whole(tmp_path, options, data=tiny.TRAIN):
    whole = run(tmp_path / "whole", options, data=data)
    run(tmp_path / "parts", options, until=8 if options.get("save_strategy") != "epoch" else 17, data=data)
    run(tmp_path / "parts", options, until=17, resume=True, data=data)
    resumed = run(tmp_path / "parts", options, resume=True, data=data)
    assert resumed.state.global_step == whole.state.global_step
    assert tiny.same(tiny.state(whole), tiny.state(resumed))


@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ["wsd_s", "schedule_free_ewa"])
def test_resumed_twice(tmp_path, method, extra):
    assert_twice_resumed_is_the_whole(tmp_path, tiny.METHODS[method] | {"ewa": True, "ewa_every": 4} | extra)


@pytest.mark.parametrize("method", ["wsd_s", "schedule_free_ewa"])
def test_resumed_twice_in_a_stream(tmp_path, method):
    options = tiny.METHODS[method] | {"gradient_accumulation_steps": 2}
    assert_twice_resumed_is_the_whole(tmp_path, options, Stream())
