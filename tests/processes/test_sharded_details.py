"""Sharded models: precision, the best model, memory, refusals, replaced optimizers.

Oracles: the master weights gathered by DeepSpeed's and torch's own functions; plain `from_pretrained`; counting every
tensor that torch makes.
"""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from processes import harness
from torch.distributed.checkpoint import FileSystemReader
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Trainer

from hf_radam import RAdamTrainer, WeightAverage
from hf_radam.checkpoints.load import consolidate
from hf_radam.trainer.compatibility import check_supported

ODD = {"vocab_size": 67, "intermediate_size": 45, "attention_dropout": 0.0}
ZERO = [name for name in harness.ZERO]
needs = {name: pytest.mark.skipif(bool(harness.missing(name)), reason=str(harness.missing(name))) for name in ZERO}
SHARDED = [
    pytest.param(name, marks=needs.get(name, ())) for name in ("fsdp2", "fsdp2_sharded", "zero2", "zero3_ungathered")
]


def options(backend, **more):
    size = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "dataloader_pin_memory": False,
        "logging_strategy": "steps",
    }
    return size | {"logging_steps": 1} | more | harness.arguments(backend)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes, and of all together."""

    largest = total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {leaf.data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() not in given:
                self.largest = max(self.largest, leaf.numel())
                self.total += leaf.numel()
        return result


# ---- Averages of shards ----


def largest_while_updating(folder, backend):
    """Return the sizes of the largest tensor made while averaging, the largest shard and the largest parameter."""
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **options(backend, ewa=True, optim="radam"))
    sizes = []
    update = WeightAverage.update

    def watched(self, step, **options):
        if not self.started:
            return update(self, step, **options)
        with LargestTensor() as watch:
            done = update(self, step, **options)
        sizes.append(watch.largest)
        return done

    WeightAverage.update = watched
    trainer.train()
    assert harness.is_really(trainer, backend)
    average = trainer.average
    parts = max(piece.numel() for piece in average.state_dict()["averages"].values())
    return max(sizes), parts, max(average.sharding.shape(name).numel() for name in average.sharding.parameters)


@pytest.mark.parametrize("backend", ["ddp", *SHARDED])
def test_averaging_makes_no_tensor_larger_than_a_shard(tmp_path, backend):
    for made, part, whole in harness.run(largest_while_updating, tmp_path, backend, backend=backend):
        assert made <= part
        if backend != "zero2":  # which cuts all parameters together, not each by itself
            assert part <= (whole + 1) // 2 + 32  # a row more where the rows are odd


# ---- Precision ----


def train_in_bf16(folder, backend, method):
    """Losses in bf16, and the average, or x, against master weights gathered by the back-end's own functions."""
    args = options(backend, bf16=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=6)
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **args | tiny.METHODS[method])
    masters = []

    class Masters(tiny.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            masters.append({name: master(p) for name, p in trainer._bare_model.named_parameters()})

    trainer.add_callback(Masters())
    trainer.train()
    history = trainer.state.log_history
    losses = [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]
    return {"losses": losses, "masters": masters, "loss": trainer.evaluate()["eval_loss"]}


def master(parameter):
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).clone()


@pytest.mark.parametrize("backend", SHARDED)
def test_bf16_rounds_neither_losses_nor_averages(tmp_path, backend):
    first, _ = harness.run(train_in_bf16, tmp_path, backend, "ewa", backend=backend)
    rounded = [float(torch.tensor(loss).bfloat16()) == loss for loss in first["losses"]]
    assert len(rounded) >= 9 and not any(rounded)
    expected, size = None, None
    for n, weights in enumerate(first["masters"], start=1):
        size = 1.0 if n == 1 else 1 - 0.5 ** (1 / (0.0625 * n))
        wide = {name: value.double() for name, value in weights.items()}
        expected = wide if n == 1 else {k: v + size * (wide[k] - v) for k, v in expected.items()}
    consolidate(tmp_path / "checkpoint-6")  # where they lie in shards
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6" / "ewa")
    assert model.dtype == torch.float32
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=2e-7, msg=name)
    # bf16 has 8 bits: losses of the same weights, computed in it or not, differ by less than 1 in 200.
    assert tiny.loss_of(model) == pytest.approx(first["loss"], rel=5e-3)


# ---- The best model ----


def train_for_the_best(folder, backend, method):
    """A learning rate at which the losses soon grow: the best weights are not the last."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    args = options(backend, **best, save_steps=2)
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **args | tiny.METHODS[method] | {"learning_rate": 5.0})
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return {"loss": loss, "best": trainer.state.best_metric, "step": trainer.state.best_global_step}


@pytest.mark.parametrize(
    ("backend", "method"),
    [pytest.param(*each.values, "schedule_free", marks=each.marks) for each in SHARDED]
    + [("ddp", "ewa"), ("fsdp2", "ewa"), pytest.param("zero1", "ewa", marks=needs["zero1"])],
)
def test_the_best_weights_are_loaded_evaluated_and_shipped(tmp_path, backend, method):
    for facts in harness.run(train_for_the_best, tmp_path, backend, method, backend=backend):
        assert facts["loss"] == facts["best"] and facts["step"] < 6
        assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(facts["loss"], abs=1e-6)


def elements_read_for_the_best(folder):
    """Return how many elements a rank reads to load the best model, and how many it holds."""
    args = options("fsdp2_sharded", optim="radam", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **args, save_strategy="steps", save_steps=2)
    read, load_best, read_data = [], trainer._load_best_model, FileSystemReader.read_data

    def counting(self, plan, planner):
        read.append(sum(item.lengths.numel() for item in plan.items))
        return read_data(self, plan, planner)

    def watched():
        FileSystemReader.read_data = counting
        load_best()
        FileSystemReader.read_data = read_data

    trainer._load_best_model = watched
    trainer.train()
    sharding = trainer._evaluation.sharding
    return sum(read), sum(sharding.model_shard(name).numel() for name in sharding.parameters)


def test_every_rank_reads_its_shard_of_the_best_weights(tmp_path):
    for read, held in harness.run(elements_read_for_the_best, tmp_path, backend="fsdp2_sharded"):
        assert read == held


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


# ---- Optimizers that DeepSpeed would replace ----


def optimizer_under_offload(folder, force):
    args = options("zero2", optim="radam_schedulefree")
    args["deepspeed"]["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if force is not None:
        args["deepspeed"]["zero_force_ds_cpu_optimizer"] = force
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **args)
    trainer.train()
    return type(trainer._bare_optimizer).__name__, trainer._bare_optimizer.param_groups[0]["k"]


@needs["zero2"]
def test_the_optimizer_stays_under_offload(tmp_path):
    assert harness.run(optimizer_under_offload, tmp_path, None, backend="zero2") == [("RAdamScheduleFree", 6)] * 2
    forced = harness.run(optimizer_under_offload, tmp_path, True, backend="zero2", check=False)
    assert all(
        "zero_force_ds_cpu_optimizer=true would replace the optimizer by DeepSpeed's CPU Adam" in o.error
        for o in forced
    )


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


# ---- Refusals ----


def refusals(folder, backend, changes):
    """What is said to each of several wrong requests."""
    said = []
    for change in changes:
        args = options(backend, optim="radam", ewa=True)
        for path, value in change.items():
            *parents, last = path.split("/")
            place = args
            for key in parents:
                place = place.setdefault(key, {})
            place[last] = value
        try:
            tiny.trainer(folder, tiny.llama(**ODD), **args)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
    return said


@needs["zero2"]
def test_deepspeed_configurations_that_are_refused(tmp_path):
    cases = {
        "section 'optimizer'.*Remove it": {"deepspeed/optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        "section 'scheduler'.*Remove it": {"deepspeed/scheduler": {"type": "WarmupLR", "params": {}}},
        "stage to 1, 2 or 3": {"deepspeed/zero_optimization/stage": 0},
        "nvme is not supported": {
            "deepspeed/zero_optimization/offload_optimizer": {"device": "nvme", "nvme_path": "/x"}
        },
        "zero_hpz_partition_size=2": {"deepspeed/zero_optimization/zero_hpz_partition_size": 2},
        "mics_shard_size=2": {"deepspeed/zero_optimization/mics_shard_size": 2},
        "mics_shard_size=auto": {"deepspeed/zero_optimization/mics_shard_size": "auto"},
        "autotp_size above 1": {"deepspeed/tensor_parallel": {"autotp_size": 2}},
        "round_robin_gradients=True": {"deepspeed/zero_optimization/round_robin_gradients": True},
        "zero_quantized_weights=True": {"deepspeed/zero_optimization/zero_quantized_weights": True},
        "zero_quantized_nontrainable_weights=True": {
            "deepspeed/zero_optimization/zero_quantized_nontrainable_weights": True
        },
    }
    for said in harness.run(refusals, tmp_path, "zero2", list(cases.values()), backend="zero2"):
        for pattern, words in zip(cases, said, strict=True):
            assert words is not None and re.search(pattern, words), (pattern, words)


def train_in_another_order(folder):
    """With the option that is refused, set behind the trainer's back."""
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **options("zero2", optim="radam", ewa=True))
    plugin = trainer.accelerator.state.deepspeed_plugin
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        config["zero_optimization"]["round_robin_gradients"] = True
    trainer.train()


@needs["zero2"]
def test_weights_in_an_order_that_is_not_known_are_an_error(tmp_path):
    for outcome in harness.run(train_in_another_order, tmp_path, backend="zero2", check=False):
        assert "are not those of the forward pass" in outcome.error, outcome.output


def train_without_our_methods(folder, options_of_zero):
    """The training weights, by our trainer with none of its methods, or by upstream's."""
    args = options("zero2", optim="adamw_torch")
    args["deepspeed"]["zero_optimization"] |= options_of_zero
    found = []
    for trainer_class, arguments in ((Trainer, tiny.stock_arguments), (RAdamTrainer, tiny.arguments)):
        trainer = trainer_class(tiny.llama(**ODD), arguments(folder, **args), train_dataset=tiny.TRAIN)
        trainer.train()
        found.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    return found


@needs["zero2"]
@pytest.mark.parametrize("options_of_zero", [{"round_robin_gradients": True}, {"stage": 0}], ids=str)
def test_without_our_methods_a_configuration_is_upstreams_business(tmp_path, options_of_zero):
    for stock, ours in harness.run(train_without_our_methods, tmp_path, options_of_zero, backend="zero2"):
        assert tiny.same(stock, ours)


def refusals_of_fsdp(folder):
    """What is said to FSDP1, and to state dicts that cannot be resumed; on CPUs accelerate makes neither."""
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **options("fsdp2", optim="radam", ewa=True))
    plugin, said = trainer.accelerator.state.fsdp_plugin, []
    for name, value in (("state_dict_type", "LOCAL_STATE_DICT"), ("fsdp_version", 1)):
        setattr(plugin, name, value)
        try:
            check_supported(trainer)
        except ValueError as error:
            said.append(str(error))
    return said


def test_fsdp_that_is_refused(tmp_path):
    for said in harness.run(refusals_of_fsdp, tmp_path, backend="fsdp2"):
        assert "LOCAL_STATE_DICT cannot be resumed" in said[0] and "fsdp_version=1 is not supported" in said[1]
