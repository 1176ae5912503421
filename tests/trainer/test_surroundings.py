"""With none of our methods on the trainer is upstream's; with them on, what users pass to it is used or refused.

Oracles: upstream's trainer, an intermediate trainer's own override, what is written in `training_args.bin`, and a spy
at the edge of the hub's library.
"""

import threading

import pytest
import schedulefree
import tiny
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_radam import RAdam, RAdamScheduleFree, RAdamTrainer, RAdamTrainerMixin
from hf_radam.checkpoints.manifest import read_manifest
from hf_radam.optim import fused
from hf_radam.trainer import compatibility, ranks

SAVING = {"save_strategy": "steps", "save_steps": 5}


def test_the_overrides_of_an_intermediate_trainer_are_used_and_its_labels_decide_nothing(tmp_path):
    class Intermediate(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.SGD, {"lr": 0.5}

        def evaluation_loop(self, dataloader, description, *args, **kwargs):
            return super().evaluation_loop(dataloader, f"Assessment of {description}", *args, **kwargs)

        def evaluate(self, *args, **kwargs):
            called.append("evaluate")
            return super().evaluate(*args, **kwargs)

    class Mixed(RAdamTrainerMixin, Intermediate):
        pass

    called: list[str] = []
    args = tiny.arguments(tmp_path, ewa=True, ewa_eval_raw=True)
    trainer = Mixed(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    with trainer.evaluation_weights():
        averaged = tiny.loss_of(trainer.model)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(averaged, abs=2e-6)
    assert metrics["eval_raw_loss"] == pytest.approx(tiny.loss_of(trainer.model), abs=2e-6)
    assert "test_raw_loss" not in trainer.predict(tiny.EVAL).metrics and called == ["evaluate"]
    own = Mixed(tiny.llama(), tiny.arguments(tmp_path, optim="radam"), train_dataset=tiny.TRAIN)
    assert isinstance(own.create_optimizer(), RAdam)


def test_a_stock_run_starts_no_threads_and_asks_no_other_rank(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("called in stock mode")

    for name in ("check_agreement", "decide_on_rank0", "check_shared_folder"):
        monkeypatch.setattr(ranks, name, refuse)
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    tiny.trainer(tmp_path, **SAVING).train()
    assert not [thread for thread in started if "tqdm" not in type(thread).__module__]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{n}" for n in (5, 10, 15, 20)}
    assert not list(tmp_path.rglob("hf_radam.json"))


def test_a_pinned_checkpoint_has_its_optimizer_and_the_arguments_as_they_were_given(tmp_path):
    options = tiny.METHODS["wsd"] | SAVING | {"save_only_model": True}
    tiny.trainer(tmp_path, **options).train()
    pinned = tmp_path / "_pre_decay" / "checkpoint-12"
    for checkpoint in (pinned, tmp_path / "checkpoint-15"):
        args = torch.load(checkpoint / "training_args.bin", weights_only=False)
        assert args.save_only_model is True and args.hub_strategy == "every_save" and args.save_total_limit is None
    assert (pinned / "optimizer.pt").is_file() and not (tmp_path / "checkpoint-15" / "optimizer.pt").exists()
    extended = tiny.trained(tmp_path / "longer", **options, extend_from=str(tmp_path), max_steps=30)
    planned = tiny.trained(tmp_path / "planned", **options, max_steps=30)
    assert tiny.same(tiny.parameters(extended.model), tiny.parameters(planned.model))


def test_the_manifest_and_the_card_name_the_optimizer_that_was_passed(tmp_path):
    model = tiny.llama()
    args = tiny.arguments(tmp_path, ewa=True, max_steps=5, **SAVING)
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    trainer = RAdamTrainer(model, args, train_dataset=tiny.TRAIN, optimizers=optimizers)
    trainer.train()
    trainer.create_model_card()
    name = "torch.optim.sgd.SGD"
    assert read_manifest(tmp_path / "checkpoint-5")["method"]["optim"] == name
    assert f"- Optimizer: `{name}`\n" in (tmp_path / "README.md").read_text(encoding="utf-8")


# ---- Fused steps ----

SAID = "The optimizer's steps are "


@pytest.mark.skipif(isinstance(fused.load_library(), str), reason=str(fused.load_library()))
@pytest.mark.parametrize("method", ["wsd", "schedule_free"])
@pytest.mark.parametrize(("wanted", "expected"), [("auto", True), ("true", True), ("false", False)])
def test_steps_are_fused_as_asked_for_and_auto_says_so(method, wanted, expected, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_radam")
    trainer = tiny.trained(tmp_path, **tiny.METHODS[method] | {"max_steps": 9}, fused_optimizer=wanted)
    assert trainer.optimizer.optimizer._fuses is expected
    assert (SAID + "fused." in caplog.messages) == expected and (SAID in caplog.text) == expected


def test_the_choice_of_a_passed_optimizer_is_kept(tmp_path):
    model = tiny.llama()
    optimizer = RAdam(model.parameters(), lr=0.01, fused=False)
    args = tiny.arguments(tmp_path, ewa=True, max_steps=1)
    RAdamTrainer(model, args, train_dataset=tiny.TRAIN, optimizers=(optimizer, None)).train()
    assert optimizer._fuses is False


def test_what_cannot_be_fused_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fused, "load_library", lambda: "there is no compiler")
    caplog.set_level("INFO", logger="hf_radam")
    options = tiny.METHODS["schedule_free"] | {"max_steps": 1}
    assert tiny.trained(tmp_path, **options, fused_optimizer="auto").optimizer.optimizer._fuses is False
    assert SAID + "not fused (fused_optimizer=auto): there is no compiler." in caplog.messages
    with pytest.raises(ValueError, match="fused_optimizer=true is not possible: there is no compiler. Leave it out"):
        tiny.trained(tmp_path, **options, fused_optimizer="true")


# ---- Optimizers and schedules that are passed, and the hub ----


@pytest.mark.parametrize("given", ["optimizer", "class"])
def test_an_optimizer_or_its_class_may_be_passed(tmp_path, given):
    """With a tensor as its learning rate; resumed in the middle of a warm-up."""

    def run(folder, resume=None, **options):
        model, numbers = tiny.llama(), {"lr": torch.tensor(0.01), "betas": (0.9, 0.95)}
        passed = {"optimizer_cls_and_kwargs": (RAdamScheduleFree, numbers)}
        if given == "optimizer":
            passed = {"optimizers": (RAdamScheduleFree(model.parameters(), **numbers), None)}
        args = tiny.arguments(folder, lr_scheduler_type="constant_with_warmup", warmup_steps=7, **SAVING, **options)
        trainer = RAdamTrainer(model, args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL, **passed)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run(tmp_path)
    loss = trainer.evaluate()["eval_loss"]
    shipped = tiny.llama()
    shipped.load_state_dict(load_file(tmp_path / "checkpoint-20" / "schedule_free" / "model.safetensors"))
    assert tiny.loss_of(shipped) == pytest.approx(loss, abs=2e-6)
    assert abs(tiny.loss_of(trainer.model) - loss) > 1e-4
    assert read_manifest(tmp_path / "checkpoint-20")["method"]["optim"] == "radam_schedulefree"
    assert tiny.same(tiny.state(trainer), tiny.state(run(tmp_path / "again", str(tmp_path / "checkpoint-5"))))
    with pytest.raises(ValueError, match="bf16_full_eval=True leaves"):
        run(tmp_path, bf16_full_eval=True)


def test_a_step_that_was_skipped_is_not_averaged(tmp_path, monkeypatch):
    """As accelerate reports fp16 steps that were skipped; here without a GPU every third one."""
    from accelerate import Accelerator

    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], max_steps=9)
    skipped = property(lambda self: trainer.state.global_step % 3 == 2)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", skipped)
    trainer.train()
    assert trainer.average.num_averaged == 6


@pytest.mark.parametrize(
    ("options", "optimizer", "message"),
    [
        ({}, schedulefree.RAdamScheduleFree, "would be evaluated and saved at y, its gradient point"),
        ({}, schedulefree.AdamWScheduleFree, "Use hf_radam.RAdamScheduleFree"),
        ({"optim": "radam_schedulefree"}, RAdam, "optim=radam_schedulefree, but an optimizer of class RAdam was"),
    ],
)
def test_optimizers_that_contradict_the_flags_are_refused(tmp_path, options, optimizer, message):
    model, args = tiny.llama(), tiny.arguments(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        RAdamTrainer(model, args, optimizers=(optimizer(model.parameters(), lr=0.1), None))
    with pytest.raises(ValueError, match=message):
        RAdamTrainer(model, args, optimizer_cls_and_kwargs=(optimizer, {"lr": 0.1}))


def test_schedules_that_contradict_the_flags_are_refused(tmp_path):
    model = tiny.llama()
    optimizer = RAdam(model.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="lr_scheduler_type=wsd, but a scheduler was passed. Drop one"):
        RAdamTrainer(model, tiny.arguments(tmp_path, optim="radam"), optimizers=(optimizer, schedule))
    optimizer = RAdamScheduleFree(model.parameters())
    args = tiny.arguments(tmp_path)  # the schedule is upstream's default, which decays
    trainer = RAdamTrainer(model, args, train_dataset=tiny.TRAIN, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="needs a constant learning rate"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_the_hub_gets_the_evaluation_weights(tmp_path, monkeypatch, strategy):
    """A spy at the edge of the hub's library keeps what would have been sent."""
    sent = []

    def keep(folder, path_in_repo):
        sent.append((path_in_repo, load_file(folder / "model.safetensors"), {p.name for p in folder.iterdir()}))

    tiny.spy_on_hub(monkeypatch, keep)
    options = tiny.METHODS["ewa"] | {"max_steps": 5, "save_strategy": "steps", "save_steps": 5}
    trainer = tiny.trained(tmp_path, **options, push_to_hub=True, hub_strategy=strategy)
    average = trainer.average.averaged_state_dict()
    models = [weights for path, weights, _ in sent if path is None]
    assert len(models) == 1 and tiny.same(models[0], average)
    checkpoints = {path: (weights, names) for path, weights, names in sent if path is not None}
    expected = {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-5"}}
    assert set(checkpoints) == expected[strategy]
    for weights, names in checkpoints.values():  # complete, with the training weights at the root
        assert tiny.same(weights, tiny.parameters(trainer.model))
        assert {"ewa", "hf_radam.json", "optimizer.pt"} <= names
    assert not (tmp_path / "_staging").exists()
    sent.clear()
    trainer.push_to_hub()
    assert tiny.same(sent[0][1], average)


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
def test_the_reduce_dtype_of_fsdp_is_kept(reduce_dtype):
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype, torch.bfloat16)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
    compatibility.check_fsdp(plugin)
    assert plugin.mixed_precision_policy.reduce_dtype is reduce_dtype
