"""Sharded models: the best model, models sharded at load time, adapters, replaced optimizers, refusals.

Oracles: plain `from_pretrained`; the uninterrupted run; upstream's trainer; the elements that torch plans to read.
"""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from processes import harness
from processes.test_moving import ODD
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, Trainer

from hf_radam import RAdamTrainer
from hf_radam.trainer.compatibility import check_supported

zero = pytest.mark.skipif(bool(harness.missing("zero2")), reason=str(harness.missing("zero2")))


def options(backend, **more):
    size = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "dataloader_pin_memory": False,
        "logging_strategy": "steps",
    }
    return size | {"logging_steps": 1} | more | harness.arguments(backend)


# ---- The best model ----


def train_for_the_best(folder, backend, method):
    """A learning rate at which the losses soon grow: the best weights are not the last."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    args = options(backend, **best, save_steps=2)
    method = tiny.METHODS[method] | ({"decay_steps": 2} if method == "wsd" else {})
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **args | method | {"learning_rate": 5.0})
    read, read_data = [], FileSystemReader.read_data

    def counting(self, plan, planner):
        read.append(sum(item.lengths.numel() for item in plan.items))
        return read_data(self, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_data", counting)
        trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    sharding = trainer._evaluation.sharding
    shards = sum(sharding.model_shard(name).numel() for name in sharding.parameters)
    facts = {"loss": loss, "best": trainer.state.best_metric, "step": trainer.state.best_global_step}
    return facts | {"read": sum(read), "shards": shards}


@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("ddp", "ewa"),
        ("fsdp2", "ewa"),
        ("fsdp2_sharded", "schedule_free"),
        ("fsdp2_sharded", "wsd"),  # the training weights, whose shards lie at the root
        pytest.param("zero2", "ewa", marks=zero),
        pytest.param("zero3_ungathered", "schedule_free", marks=zero),
    ],
)
def test_the_best_weights_are_loaded_evaluated_and_shipped(tmp_path, backend, method):
    for facts in harness.run(train_for_the_best, tmp_path, backend, method, backend=backend):
        assert facts["loss"] == facts["best"] and facts["step"] < 6
        if backend == "fsdp2_sharded":  # every rank reads its shards alone
            assert facts["read"] == facts["shards"]
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(facts["loss"], abs=1e-6)


# ---- Sharded at load time ----


def train_sharded_at_load_time(folder, source):
    """A model that transformers shards while it loads it; such a run cannot be resumed, upstream says."""
    from transformers.distributed import DistributedConfig

    harness.join_group()
    model = AutoModelForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2))
    args = tiny.arguments(folder, **options("ddp", optim="radam_schedulefree", save_strategy="no"))
    trainer = RAdamTrainer(model, args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
    trainer.train()
    assert all(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return loss


def test_a_model_sharded_at_load_time(tmp_path):
    tiny.llama(attention_dropout=0.0).save_pretrained(tmp_path / "source")
    losses = harness.run(train_sharded_at_load_time, tmp_path / "run", str(tmp_path / "source"), backend="fsdp2")
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert losses == pytest.approx([tiny.loss_of(shipped)] * 2, abs=1e-6)


# ---- An adapter under DDP ----


def train_adapter(folder):
    import peft

    def made(name):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], init_lora_weights=False)
        args = options("ddp", optim="radam", ewa=True, save_strategy="steps", save_steps=3)
        return tiny.trainer(folder / name, peft.get_peft_model(tiny.llama(**ODD), config), **args)

    trainer, resumed = made("run"), made("resumed")
    trainer.train()
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    bytes_of = sum(piece.nbytes for piece in trainer.average.state_dict()["averages"].values())
    averages = [t.average.averaged_state_dict() for t in (trainer, resumed)]
    return trainer.evaluate()["eval_loss"], bytes_of, averages


def test_an_adapter_under_ddp(tmp_path):
    import peft

    (loss, first, (average, resumed)), (_, second, _) = harness.run(train_adapter, tmp_path, backend="ddp")
    trained = {name: value for name, value in average.items() if "lora" in name}
    assert first + second == 4 * sum(value.numel() for value in trained.values()) and abs(first - second) <= 4 * 16
    assert tiny.same(average, resumed)
    folder = tmp_path / "run" / "checkpoint-6" / "ewa" / "adapter"
    shipped = peft.PeftModel.from_pretrained(tiny.llama(**ODD), folder)
    assert tiny.loss_of(shipped) == pytest.approx(loss, abs=1e-6)


# ---- DeepSpeed's options ----

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SECTIONS_REFUSED = {
    "section 'optimizer'.*Remove it": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
    "section 'scheduler'.*Remove it": {"scheduler": {"type": "WarmupLR", "params": {}}},
    "autotp_size above 1": {"tensor_parallel": {"autotp_size": 2}},
    "zero_force_ds_cpu_optimizer=true would replace the optimizer by DeepSpeed's CPU Adam": {
        "zero_force_ds_cpu_optimizer": True,
        "zero_optimization": {"stage": 2} | OFFLOAD,
    },
}
ZERO_REFUSED = {
    "stage to 1, 2 or 3": {"stage": 0},
    "nvme is not supported": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}},
    "zero_hpz_partition_size=2": {"zero_hpz_partition_size": 2},
    "mics_shard_size=2": {"mics_shard_size": 2},
    "mics_shard_size=auto": {"mics_shard_size": "auto"},
    "round_robin_gradients=True": {"round_robin_gradients": True},
    "zero_quantized_weights=True": {"zero_quantized_weights": True},
    "zero_quantized_nontrainable_weights=True": {"zero_quantized_nontrainable_weights": True},
}


def with_config(method, sections=(), of_zero=()):
    """The arguments of a training with a changed configuration of DeepSpeed, which is read anew."""
    AcceleratorState._reset_state()
    args = options("zero2", **method)
    args["deepspeed"] |= dict(sections)
    args["deepspeed"]["zero_optimization"] |= dict(of_zero)
    return args


def trainer_with(folder, method, sections=(), of_zero=()):
    return tiny.trainer(folder, tiny.llama(**ODD), **with_config(method, sections, of_zero))


def error_of(do, *args, **kwargs):
    """The error that a call raises, or None."""
    try:
        do(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def try_options(folder):
    """Offer DeepSpeed's options to trainers; return what was refused, and what was trained."""
    average = {"optim": "radam", "ewa": True}
    changes = [(sections, ()) for sections in SECTIONS_REFUSED.values()]
    changes += [((), of_zero) for of_zero in ZERO_REFUSED.values()]
    found = {"refused": [error_of(trainer_with, folder, average, *change) for change in changes]}

    trainer = trainer_with(folder, {"optim": "radam_schedulefree"}, of_zero=OFFLOAD)
    trainer.train()
    found["under offload"] = type(trainer._bare_optimizer).__name__, trainer._bare_optimizer.param_groups[0]["k"]

    for name, of_zero in (("another order", {"round_robin_gradients": True}), ("no ZeRO", {"stage": 0})):
        found[name] = []
        for trainer_class, arguments in ((Trainer, tiny.stock_arguments), (RAdamTrainer, tiny.arguments)):
            args = arguments(folder, **with_config({"optim": "adamw_torch"}, of_zero=of_zero))
            trainer = trainer_class(tiny.llama(**ODD), args, train_dataset=tiny.TRAIN)
            trainer.train()
            found[name].append(tiny.parameters(trainer.model))

    trainer = trainer_with(folder, average)
    plugin = trainer.accelerator.state.deepspeed_plugin
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):  # behind the trainer's back
        config["zero_optimization"]["round_robin_gradients"] = True
    found["behind its back"] = error_of(trainer.train)
    return found


@zero
def test_options_of_deepspeed_work_or_are_refused(tmp_path):
    """Without this package's methods a configuration is upstream's business."""
    for found in harness.run(try_options, tmp_path, backend="zero2"):
        for pattern, words in zip([*SECTIONS_REFUSED, *ZERO_REFUSED], found["refused"], strict=True):
            assert words is not None and re.search(pattern, words), (pattern, words)
        assert found["under offload"] == ("RAdamScheduleFree", 6)
        assert tiny.same(*found["another order"]) and tiny.same(*found["no ZeRO"])
        assert "are not those of the forward pass" in found["behind its back"]


# ---- FSDP ----


def refusals_of_fsdp(folder):
    """What is said to FSDP1, and to state dicts that cannot be resumed; on CPUs accelerate makes neither."""
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **options("fsdp2", optim="radam", ewa=True))
    plugin, said = trainer.accelerator.state.fsdp_plugin, []
    for name, value in (("state_dict_type", "LOCAL_STATE_DICT"), ("fsdp_version", 1)):
        setattr(plugin, name, value)
        said.append(error_of(check_supported, trainer))
    return said


def test_fsdp_that_is_refused(tmp_path):
    for said in harness.run(refusals_of_fsdp, tmp_path, backend="fsdp2"):
        assert "LOCAL_STATE_DICT cannot be resumed" in said[0] and "fsdp_version=1 is not supported" in said[1]
