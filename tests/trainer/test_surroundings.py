"""Optimizers and schedules that are passed, refusals, `model_init`, and pushes to the hub."""

import pytest
import schedulefree
import tiny
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from hf_radam import RAdam, RAdamScheduleFree, RAdamTrainer
from hf_radam.checkpoints.manifest import read_manifest


def test_an_optimizer_may_be_passed(tmp_path):
    """With a tensor as its learning rate; resumed in the middle of a warm-up."""

    def run(folder, resume=None):
        model = tiny.llama()
        optimizer = RAdamScheduleFree(model.parameters(), lr=torch.tensor(0.01), betas=(0.9, 0.95))
        options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 7}
        args = tiny.arguments(folder, **options, save_strategy="steps", save_steps=5)
        data = {"train_dataset": tiny.TRAIN, "eval_dataset": tiny.EVAL}
        trainer = RAdamTrainer(model, args, **data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run(tmp_path)
    loss = trainer.evaluate()["eval_loss"]
    shipped = tiny.llama()
    shipped.load_state_dict(load_file(tmp_path / "checkpoint-20" / "schedule_free" / "model.safetensors"))
    assert tiny.loss_of(shipped) == pytest.approx(loss, abs=2e-6)
    assert abs(tiny.loss_of(trainer.model) - loss) > 1e-4
    assert tiny.same(tiny.state(trainer), tiny.state(run(tmp_path / "again", str(tmp_path / "checkpoint-5"))))


def test_the_class_of_an_optimizer_may_be_passed(tmp_path):
    """With Mixtral, whose weights upstream would not read."""
    given = (RAdamScheduleFree, {"lr": 1e-2, "betas": (0.9, 0.95)})

    def run(folder, resume=None, **options):
        args = tiny.arguments(folder, lr_scheduler_type="constant", save_strategy="steps", save_steps=10, **options)
        trainer = RAdamTrainer(tiny.mixtral(), args, train_dataset=tiny.TRAIN, optimizer_cls_and_kwargs=given)
        trainer.train(resume_from_checkpoint=resume)
        return tiny.parameters(trainer.model)

    weights = run(tmp_path)
    assert tiny.same(weights, run(tmp_path / "again", str(tmp_path / "checkpoint-10")))
    assert read_manifest(tmp_path / "checkpoint-10")["method"]["optim"] == "radam_schedulefree"
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
        (
            {"optim": "radam_schedulefree"},
            RAdam,
            "optim=radam_schedulefree, but an optimizer of class RAdam was passed. Drop one",
        ),
        ({"optim": "radam"}, torch.optim.AdamW, "optim=radam, but an optimizer of class AdamW was passed"),
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
    trainer = RAdamTrainer(
        model, tiny.arguments(tmp_path), train_dataset=tiny.TRAIN, optimizers=(optimizer, None)
    )  # the schedule is upstream's default, which decays
    with pytest.raises(ValueError, match="needs a constant learning rate"):
        trainer.train()


def test_a_model_init_starts_over_each_time(tmp_path):
    args = tiny.arguments(tmp_path, **tiny.METHODS["ewa"])
    trainer = RAdamTrainer(args=args, model_init=lambda: tiny.llama(), train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append(
            (tiny.parameters(trainer.model), trainer.average.averaged_state_dict(), trainer.evaluate()["eval_loss"])
        )
    assert tiny.same(runs[0][0], runs[1][0]) and tiny.same(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_the_hub_gets_the_evaluation_weights(tmp_path, monkeypatch, strategy):
    """A spy at the edge of the hub's library keeps what would have been sent."""
    sent = []

    def keep(folder, path_in_repo):
        sent.append((path_in_repo, load_file(folder / "model.safetensors"), {p.name for p in folder.iterdir()}))

    tiny.spy_on_hub(monkeypatch, keep)
    trainer = tiny.trained(
        tmp_path, **tiny.METHODS["ewa"], save_strategy="steps", save_steps=20, push_to_hub=True, hub_strategy=strategy
    )
    average = trainer.average.averaged_state_dict()
    models = [weights for path, weights, _ in sent if path is None]
    assert len(models) == 1 and tiny.same(models[0], average)
    checkpoints = {path: (weights, names) for path, weights, names in sent if path is not None}
    expected = {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-20"}}
    assert set(checkpoints) == expected[strategy]
    for weights, names in checkpoints.values():  # complete, with the training weights at the root
        assert tiny.same(weights, tiny.parameters(trainer.model))
        assert {"ewa", "hf_radam.json", "optimizer.pt"} <= names
    assert not (tmp_path / "_staging").exists()
    sent.clear()
    trainer.push_to_hub()
    assert tiny.same(sent[0][1], average)
