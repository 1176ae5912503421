"""With none of our methods on the trainer is upstream's; with them on, upstream's arguments and labels are not touched.

Oracles: upstream's trainer, an intermediate trainer's own override, and what is written in `training_args.bin`.
"""

import threading

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback

from hf_radam import RAdam, RAdamTrainer, RAdamTrainerMixin
from hf_radam.checkpoints.manifest import read_manifest
from hf_radam.trainer import ranks

SAVING = {"save_strategy": "steps", "save_steps": 5}


def test_the_override_of_an_intermediate_trainer_is_used(tmp_path):
    class Intermediate(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.SGD, {"lr": 0.5}

    class Mixed(RAdamTrainerMixin, Intermediate):
        pass

    trainer = Mixed(tiny.llama(), tiny.arguments(tmp_path), train_dataset=tiny.TRAIN)
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
    assert Mixed.get_optimizer_cls_and_kwargs(trainer.args) == (torch.optim.SGD, {"lr": 0.5})
    own = Mixed(tiny.llama(), tiny.arguments(tmp_path, optim="radam"), train_dataset=tiny.TRAIN)
    assert isinstance(own.create_optimizer(), RAdam)


def test_a_stock_run_starts_no_threads_and_asks_no_other_rank(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("called in stock mode")

    for name in ("check_agreement", "decide_on_rank0", "check_shared_folder"):
        monkeypatch.setattr(ranks, name, refuse)
    before = threading.active_count()
    started = []
    monkeypatch.setattr(
        threading.Thread, "start", lambda self: started.append(self) if "tqdm" not in self.name else None
    )
    tiny.trainer(tmp_path, **SAVING).train()
    assert started == [] and threading.active_count() == before
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
    resumed = tiny.trained(tmp_path / "resumed", **options, resume=pinned)
    twin = tiny.trained(tmp_path / "twin", **options)
    assert tiny.same(tiny.parameters(resumed.model), tiny.parameters(twin.model))
    extended = tiny.trained(tmp_path / "longer", **options, extend_from=str(tmp_path), max_steps=30)
    planned = tiny.trained(tmp_path / "planned", **options, max_steps=30)
    assert tiny.same(tiny.parameters(extended.model), tiny.parameters(planned.model))


def test_the_manifest_names_the_optimizer_that_was_passed(tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = tiny.arguments(tmp_path, ewa=True, **SAVING)
    trainer = RAdamTrainer(model, args, train_dataset=tiny.TRAIN, optimizers=(optimizer, None))
    trainer.train()
    trainer.create_model_card()
    name = "torch.optim.sgd.SGD"
    assert read_manifest(tmp_path / "checkpoint-20")["method"]["optim"] == name
    assert f"- Optimizer: `{name}`\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
    model = tiny.llama()
    again = RAdamTrainer(
        model,
        tiny.arguments(tmp_path / "x", ewa=True),
        train_dataset=tiny.TRAIN,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert tiny.same(tiny.parameters(trainer.model), tiny.parameters(model))


def test_callback_states_are_restored_without_a_warning_of_our_mark(tmp_path, caplog):
    options = tiny.METHODS["ewa"] | SAVING | {"restore_callback_states_from_checkpoint": True}
    tiny.trainer(tmp_path, **options, max_steps=10).train()
    caplog.clear()
    trainer = tiny.trained(tmp_path, **options, resume=True)
    assert "callbacks not included" not in caplog.text
    twin = tiny.trained(tmp_path / "twin", **options)
    assert tiny.same(twin.average.averaged_state_dict(), trainer.average.averaged_state_dict())


def test_a_label_of_upstreams_decides_nothing(tmp_path):
    class Reworded(Trainer):
        def evaluation_loop(self, dataloader, description, *args, **kwargs):
            return super().evaluation_loop(dataloader, f"Assessment of {description}", *args, **kwargs)

        def evaluate(self, *args, **kwargs):
            labels.append("evaluate")
            return super().evaluate(*args, **kwargs)

    class Mixed(RAdamTrainerMixin, Reworded):
        pass

    labels: list[str] = []
    args = tiny.arguments(tmp_path, ewa=True, ewa_eval_raw=True)
    trainer = Mixed(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
    trainer.train()
    with trainer.evaluation_weights():
        averaged = tiny.loss_of(trainer.model)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(averaged, abs=2e-6)
    assert metrics["eval_raw_loss"] == pytest.approx(tiny.loss_of(trainer.model), abs=2e-6)
    assert "test_raw_loss" not in trainer.predict(tiny.EVAL).metrics and labels == ["evaluate"]


def test_arguments_are_the_same_after_an_extension(tmp_path):
    """Used again for another run they give the warm-up and the budgets that they say."""
    options = tiny.METHODS["wsd_s"] | {"budgets": [10], "warmup_steps": 3, "decay_steps": 0.2}
    tiny.trainer(tmp_path / "run", **options).train()
    later = options | {"budgets": None, "warmup_steps": 0, "max_steps": 40, "extend_from": str(tmp_path / "run")}
    args = tiny.arguments(tmp_path / "extended", **later)
    before = args.to_dict()
    RAdamTrainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train()
    assert args.to_dict() == before
    args.extend_from = None
    schedule = args.schedule(40)
    assert schedule.warmup_steps == 0 and list(schedule.budgets) == [40]


def test_every_callback_of_the_user_sees_the_training_weights_at_the_end(tmp_path):
    class Looks(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.weights = tiny.parameters(model)

    looks = Looks()
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"])
    trainer.add_callback(looks)
    trainer.train()
    assert tiny.same(looks.weights, tiny.parameters(trainer.model))
