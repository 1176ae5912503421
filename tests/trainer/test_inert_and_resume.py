"""Saving and evaluating leave a run as it was, and a resumed run is its uninterrupted twin: compared bit for bit."""

import re
import shutil

import pytest
import tiny
import torch
from transformers import Trainer

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.manifest import CheckpointError


def finished(folder, build=tiny.llama, resume=None, **options):
    """Train to the end; returns training weights, averages (or None) and the trainer."""
    trainer = tiny.trainer(folder, build(), **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    average = trainer.average.averaged_state_dict() if trainer.average is not None else {}
    return tiny.parameters(trainer.model), average, trainer


@pytest.mark.parametrize("method", tiny.METHODS)
def test_evaluating_and_saving_change_nothing(tmp_path, method):
    options = tiny.METHODS[method]
    quiet, quiet_average, _ = finished(tmp_path / "quiet", **options)
    for every in (1, 7):
        busy, busy_average, _ = finished(
            tmp_path / str(every),
            **options,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            eval_on_start=True,
        )
        assert tiny.same(quiet, busy) and tiny.same(quiet_average, busy_average)


def test_the_test_above_can_fail(tmp_path):
    """Stock evaluation draws from the global random state, and with dropout that changes the rest of the run."""
    runs = []
    for strategy in ("no", "steps"):
        args = tiny.stock_arguments(tmp_path / strategy, eval_strategy=strategy, eval_steps=1)
        trainer = Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        runs.append(tiny.parameters(trainer.model))
    assert not tiny.same(*runs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_resuming_is_bitwise_in_every_phase(tmp_path, method, accumulation):
    """Updates 3 to 18 of 20: silent phase, stable phase, both decays of WSD-S, a budget, between averagings, epochs."""
    options = tiny.METHODS[method] | {"gradient_accumulation_steps": accumulation, "warmup_steps": 4}
    weights, average, twin = finished(tmp_path, **options, save_strategy="steps", save_steps=1)
    for update in (3, 8, 10, 14, 16, 18):
        again, average_again, trainer = finished(
            tmp_path / "resumed", resume=tmp_path / f"checkpoint-{update}", **options
        )
        assert tiny.same(weights, again), update
        assert tiny.same(average, average_again), update
        if trainer.average is not None:
            assert trainer.average.counters() == twin.average.counters()


@pytest.mark.parametrize("build", [tiny.mixtral, tiny.tied, tiny.bf16, tiny.partly_frozen, tiny.float64])
def test_resuming_is_bitwise_for_other_models(tmp_path, build):
    options = {"optim": "adamw_torch", "ewa": True, "ewa_every": 2, "save_strategy": "steps", "save_steps": 7}
    weights, average, _ = finished(tmp_path, build, **options)
    shutil.rmtree(tmp_path / "checkpoint-20")
    again, average_again, _ = finished(tmp_path, build, resume=tmp_path / "checkpoint-7", **options)
    assert tiny.same(weights, again) and tiny.same(average, average_again)


def test_with_none_of_our_flags_the_trainer_is_upstreams(tmp_path):
    runs = []
    for cls in (RAdamTrainer, Trainer):
        make = tiny.stock_arguments if cls is Trainer else tiny.arguments
        args = make(
            tmp_path / cls.__name__,
            eval_strategy="steps",
            eval_steps=3,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="steps",
            save_steps=10,
        )
        trainer = cls(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        trainer.save_model()
        timed = re.compile("runtime|per_second")
        history = [{k: v for k, v in e.items() if not timed.search(k)} for e in trainer.state.log_history]
        files = sorted(p.relative_to(tmp_path / cls.__name__).as_posix() for p in (tmp_path / cls.__name__).rglob("*"))
        bytes_of = [(tmp_path / cls.__name__ / f / "model.safetensors").read_bytes() for f in (".", "checkpoint-10")]
        runs.append((tiny.parameters(trainer.model), history, files, bytes_of, torch.get_rng_state().tolist()))
    assert tiny.same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_a_stock_checkpoint_resumes_and_the_average_starts_there(tmp_path, caplog):
    common = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **common)
    weights, average, trainer = finished(tmp_path, resume=tmp_path / "checkpoint-10", **common, ewa=True, ewa_decay=0.9)
    assert trainer.average.counters() | {"weight_sum": 0} == {
        "num_averaged": 10,
        "last_step": 20,
        "start_step": 10,
        "weight_sum": 0,
    }
    assert not tiny.same(weights, average)
    # and that is what a resumed resumed run goes on with
    _, again, second = finished(tmp_path, resume=tmp_path / "checkpoint-20", **common, ewa=True, ewa_decay=0.9)
    assert tiny.same(again, average) and second.average.start_step == 10


REFUSED = [
    ({"learning_rate": 2e-2}, "trained with learning_rate=0.01, the arguments say 0.02"),
    ({"weight_decay": 0.2}, "trained with weight_decay=0.1, the arguments say 0.2"),
    ({"adam_beta2": 0.99}, "trained with betas=(0.9, 0.95), the arguments say (0.9, 0.99)"),
    ({"optim": "adamw_torch"}, "was trained with optim=radam, the arguments say adamw_torch"),
    ({"decay_steps": 14}, "stands at update 10 with learning rate 0.01, but the schedule of these arguments has"),
    ({"max_steps": 14}, "stands at update 10 with learning rate 0.01"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[str(changed) for changed, _ in REFUSED])
def test_resuming_with_other_hyperparameters_is_refused(tmp_path, changed, message):
    options = {
        "optim": "radam",
        "lr_scheduler_type": "wsd",
        "decay_steps": 8,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    finished(tmp_path, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        finished(tmp_path, resume=tmp_path / "checkpoint-10", **options | changed)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "constant_with_warmup"])
def test_leaving_a_decay_for_another_schedule_is_refused(tmp_path, schedule):
    finished(tmp_path, **tiny.METHODS["wsd"], save_strategy="steps", save_steps=18)
    with pytest.raises(CheckpointError, match="stands at update 18 with learning rate"):
        finished(tmp_path, resume=tmp_path / "checkpoint-18", optim="radam", lr_scheduler_type=schedule, max_steps=40)


def test_another_warm_up_is_refused(tmp_path):
    options = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **options, warmup_steps=15)
    with pytest.raises(CheckpointError, match="stands at update 10 with learning rate"):
        finished(tmp_path, resume=tmp_path / "checkpoint-10", **options, warmup_steps=5)


def test_a_dropped_or_changed_average_is_told(tmp_path, caplog):
    options = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **options)
    finished(tmp_path / "a", resume=tmp_path / "checkpoint-10", **options, ewa_every=2)
    assert "goes on with another window (old, new): {'every': (1, 2)}" in caplog.text
    finished(tmp_path / "b", resume=tmp_path / "checkpoint-10", optim="radam", lr_scheduler_type="constant")
    assert "keeps an average, and ewa is off: it ends here" in caplog.text


class Stream(torch.utils.data.IterableDataset):
    """Data without a length: a round has 16 updates of 4 sequences."""

    def __iter__(self):
        return iter(tiny.TRAIN)


def test_streaming_data_resumes_bitwise_in_its_first_round_and_is_refused_later(tmp_path):
    def streamed(folder, resume=None):
        args = tiny.arguments(folder, **tiny.METHODS["ewa"], max_steps=24, save_strategy="steps", save_steps=6)
        trainer = RAdamTrainer(tiny.llama(), args, train_dataset=Stream())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = streamed(tmp_path)
    again = streamed(tmp_path / "again", str(tmp_path / "checkpoint-12"))
    assert tiny.same(tiny.parameters(whole.model), tiny.parameters(again.model))
    assert tiny.same(whole.average.averaged_state_dict(), again.average.averaged_state_dict())
    with pytest.raises(CheckpointError, match="round 2 through a train_dataset without a length"):
        streamed(tmp_path / "late", str(tmp_path / "checkpoint-18"))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    finished(tmp_path, **tiny.METHODS["ewa"], save_strategy="steps", save_steps=10)
    for folder in (tmp_path, tmp_path / "checkpoint-99"):
        with pytest.raises(CheckpointError, match="has no trainer_state.json: to resume, give the folder"):
            finished(tmp_path / "x", resume=folder, **tiny.METHODS["ewa"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    options = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **options)
    for sizes in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 16}):
        with pytest.raises(CheckpointError, match="does not hold the weights of|cannot be read as a"):
            finished(tmp_path, lambda sizes=sizes: tiny.llama(**sizes), resume=tmp_path / "checkpoint-10", **options)


class OfTwo(tiny.LlamaForCausalLM):
    """A model that is not made from a configuration alone."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def test_a_class_that_from_pretrained_cannot_make_resumes_bitwise(tmp_path):
    def build():
        torch.manual_seed(0)
        return OfTwo(tiny.LlamaConfig(**tiny.SIZES), extra=1)

    options = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    weights, average, _ = finished(tmp_path, build, **options)
    again, average_again, _ = finished(tmp_path / "again", build, resume=tmp_path / "checkpoint-10", **options)
    assert tiny.same(weights, again) and tiny.same(average, average_again)


def test_more_updates_may_be_asked_for_while_the_schedule_is_stable(tmp_path):
    options = {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 5}
    finished(tmp_path / "short", **options, save_strategy="steps", save_steps=10)
    longer, _, _ = finished(tmp_path / "short", resume=tmp_path / "short/checkpoint-10", **options | {"max_steps": 30})
    planned, _, _ = finished(tmp_path / "long", **options | {"max_steps": 30})
    assert tiny.same(longer, planned)


def test_another_optimizer_is_found_out_without_a_manifest(tmp_path):
    common = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **common, optim="adamw_torch")
    with pytest.raises(ValueError, match="was trained with another optimizer: its parameter groups differ in"):
        finished(tmp_path, resume=tmp_path / "checkpoint-10", **common, optim="radam")


@pytest.mark.parametrize("method", tiny.METHODS)
def test_resuming_a_finished_run_trains_nothing_more(tmp_path, method):
    options = tiny.METHODS[method] | {"save_strategy": "steps", "save_steps": 10}
    weights, average, first = finished(tmp_path, **options)
    again, average_again, second = finished(tmp_path, resume=tmp_path / "checkpoint-20", **options)
    assert tiny.same(weights, again) and tiny.same(average, average_again)
    assert second.state.global_step == 20 and second.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]


def test_incomplete_checkpoints_are_refused(tmp_path):
    options = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **options)

    def resumed_without(name):
        shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "copy" / "checkpoint-10")
        (tmp_path / "copy/checkpoint-10" / name).unlink()
        try:
            finished(tmp_path, resume=tmp_path / "copy/checkpoint-10", **options)
        finally:
            shutil.rmtree(tmp_path / "copy")

    for name, message in (
        ("ewa/model.safetensors", "ewa/model.safetensors is missing"),
        ("optimizer.pt", "optimizer.pt is missing"),
        ("hf_radam.json", "has ewa/ but no hf_radam.json: it is damaged or incomplete"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            resumed_without(name)
    stock = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 10, "save_only_model": True}
    finished(tmp_path / "stock", **stock)
    with pytest.raises(CheckpointError, match=re.escape("has no optimizer.pt")):
        finished(tmp_path, resume=tmp_path / "stock/checkpoint-10", **stock | {"ewa": True})


def test_another_start_of_the_average_is_refused(tmp_path):
    options = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    finished(tmp_path, **options)
    with pytest.raises(ValueError, match="trained with ewa_start_step=0, the arguments say 5"):
        finished(tmp_path, resume=tmp_path / "checkpoint-10", **options | {"ewa_start_step": 5})
