"""Saving and evaluating leave a run as it was, and a resumed run is its uninterrupted twin: compared bit for bit."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import Trainer

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.manifest import CheckpointError

SAVED = {"save_strategy": "steps", "save_steps": 10}


def assert_same(one, other):
    assert tiny.same(tiny.state(one), tiny.state(other))


@pytest.mark.parametrize("method", tiny.METHODS)
def test_saving_and_evaluating_change_nothing_and_resuming_is_bitwise_in_every_phase(tmp_path, method):
    """Warm-up, stable phase, both decays of WSD-S, a budget, between averagings, ends of an epoch and of the run."""
    options = tiny.METHODS[method] | {"warmup_steps": 4}
    quiet = tiny.trained(tmp_path / "quiet", **options)
    busy = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_on_start": True}
    assert_same(quiet, tiny.trained(tmp_path, **options, **busy))
    loss = quiet.evaluate()["eval_loss"]
    for step in (3, 8, 10, 16, 20):
        again = tiny.trained(tmp_path / "resumed", **options, resume=tmp_path / f"checkpoint-{step}")
        assert_same(quiet, again)
        assert again.state.global_step == 20 and again.evaluate()["eval_loss"] == loss


def test_the_test_above_can_fail(tmp_path):
    """Stock evaluation draws from the global random state, and with dropout that changes the rest of the run."""
    runs = []
    for strategy in ("no", "steps"):
        args = tiny.stock_arguments(tmp_path / strategy, eval_strategy=strategy, eval_steps=1, max_steps=3)
        trainer = Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        runs.append(tiny.parameters(trainer.model))
    assert not tiny.same(*runs)


class OfTwo(tiny.LlamaForCausalLM):
    """A model that is not made from a configuration alone."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def of_two():
    torch.manual_seed(0)
    return OfTwo(tiny.LlamaConfig(**tiny.SIZES), extra=1)


@pytest.mark.parametrize("build", [tiny.float64, of_two])
def test_resuming_is_bitwise_for_other_models(tmp_path, build):
    """More of them are resumed in `test_evaluation_weights.py`."""
    options = {"optim": "adamw_torch", "ewa": True, "ewa_every": 2, "save_strategy": "steps", "save_steps": 7}
    twin = tiny.trained(tmp_path, build(), **options)
    assert_same(twin, tiny.trained(tmp_path / "again", build(), **options, resume=tmp_path / "checkpoint-7"))


# ---- With none of our flags, and what is refused ----


def test_with_none_of_our_flags_the_trainer_and_its_model_card_are_upstreams(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 3, "logging_strategy": "steps", "logging_steps": 1} | SAVED
    runs = []
    for cls, make in ((RAdamTrainer, tiny.arguments), (Trainer, tiny.stock_arguments)):
        folder = tmp_path / cls.__name__ / "run"  # the model card has the name of the last folder
        trainer = cls(tiny.llama(), make(folder, **every), train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(tags=["mine"], tasks="text-generation", dataset_tags="me/data", dataset="data")
        timed = re.compile("runtime|per_second")
        history = [{k: v for k, v in e.items() if not timed.search(k)} for e in trainer.state.log_history]
        files = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for path in files:
            if path.name in ("training_args.bin", "trainer_state.json"):  # these name the class, the folder and times
                files[path] = b""
        runs.append((tiny.parameters(trainer.model), history, files, torch.get_rng_state().tolist()))
    assert tiny.same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert b"hf_radam" not in files[Path("README.md")]


EWA, WSD = tiny.METHODS["ewa"] | SAVED, tiny.METHODS["wsd"] | SAVED
STOCK = {"optim": "adamw_torch", "lr_scheduler_type": "constant"} | SAVED


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of finished runs with checkpoints after 10 and 20 steps."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"ewa": EWA, "wsd": WSD, "stock": STOCK, "warm": EWA | {"warmup_steps": 15}}
    for name, options in (kinds | {"models": STOCK | {"save_only_model": True}}).items():
        tiny.trained(folder / name, **options)
    return folder


CONSTANT = {"optim": "radam", "lr_scheduler_type": "constant", "max_steps": 40}
REFUSED = [
    ("wsd/checkpoint-10", WSD | {"learning_rate": 2e-2}, "trained with learning_rate=0.01, the arguments say 0.02"),
    ("wsd/checkpoint-10", WSD | {"weight_decay": 0.2}, "trained with weight_decay=0.1, the arguments say 0.2"),
    ("wsd/checkpoint-10", WSD | {"adam_beta2": 0.99}, "trained with betas=(0.9, 0.95), the arguments say (0.9, 0.99)"),
    ("wsd/checkpoint-10", WSD | {"decay_steps": 14}, "is at step 10 with learning rate 0.01, but the schedule of"),
    ("wsd/checkpoint-20", CONSTANT, "is at step 20 with learning rate 0, but the schedule of these arguments has 0.01"),
    ("warm/checkpoint-10", EWA | {"warmup_steps": 5}, "is at step 10 with learning rate 0.00666667"),
    ("ewa/checkpoint-10", EWA | {"ewa_start_step": 5}, "trained with ewa_start_step=0, the arguments say 5"),
    ("stock/checkpoint-10", STOCK | {"optim": "radam"}, "trained with another optimizer: its parameter groups differ"),
    ("models/checkpoint-10", STOCK | {"ewa": True}, "has no optimizer.pt, so it cannot be resumed"),
    ("ewa/checkpoint-99", EWA, "has no trainer_state.json. Give the folder of a checkpoint"),
]


@pytest.mark.parametrize(("checkpoint", "options", "message"), REFUSED, ids=[f"{c}: {m}" for c, _, m in REFUSED])
def test_what_cannot_be_resumed_is_refused(tmp_path, runs, checkpoint, options, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        tiny.trained(tmp_path, resume=runs / checkpoint, **options)


def test_a_stock_checkpoint_resumes_and_the_average_starts_there(tmp_path, runs):
    options = STOCK | {"ewa": True, "ewa_decay": 0.9}
    first = tiny.trained(tmp_path, resume=runs / "stock/checkpoint-10", **options)
    counters = first.average.counters()
    assert (counters["num_averaged"], counters["last_step"], counters["start_step"]) == (10, 20, 10)
    assert not tiny.same(tiny.parameters(first.model), first.average.averaged_state_dict())
    # and a run resumed from that one continues with it
    assert_same(first, tiny.trained(tmp_path, resume=tmp_path / "checkpoint-20", **options))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, runs):
    for sizes in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 16}):
        with pytest.raises(CheckpointError, match="does not hold the weights of|cannot be read as a"):
            tiny.trained(tmp_path, tiny.llama(**sizes), resume=runs / "ewa/checkpoint-10", **EWA)


def test_a_dropped_or_changed_average_is_logged(tmp_path, runs, caplog):
    tiny.trained(tmp_path / "a", resume=runs / "ewa/checkpoint-10", **EWA, ewa_every=2)
    assert "the average continues with another window (old, new): {'every': (1, 2)}" in caplog.text
    tiny.trained(tmp_path / "b", resume=runs / "ewa/checkpoint-10", optim="radam", lr_scheduler_type="constant")
    assert "has an average, and ewa is off: it ends here" in caplog.text


def test_more_steps_may_be_asked_for_while_the_schedule_is_stable(tmp_path, runs):
    options = tiny.METHODS["wsd"] | {"max_steps": 30}
    longer = tiny.trained(tmp_path / "longer", **options, resume=runs / "wsd/checkpoint-10")
    assert_same(longer, tiny.trained(tmp_path / "planned", **options))


# ---- The place in the data ----


class Counted(list):
    """Data that keeps the order in which it is asked."""

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def samples_of(folder, **options):
    """Train; returns the samples in the order in which they were asked for."""
    resume = options.pop("resume", None)
    trainer = tiny.trainer(folder, optim="radam", max_steps=12, **options)
    trainer.train_dataset = Counted(tiny.TRAIN)
    trainer.train_dataset.asked = []
    trainer.train(resume_from_checkpoint=resume)
    return trainer.train_dataset.asked


def test_the_place_in_the_data(tmp_path, caplog):
    order = samples_of(tmp_path, save_strategy="steps", save_steps=6)
    for batch, accumulation, same in ((2, 2, True), (2, 1, False), (4, 2, False)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        caplog.clear()
        resumed = samples_of(tmp_path / "new", resume=str(tmp_path / "checkpoint-6"), **sizes)
        assert (resumed[:4] == order[6 * 4 : 7 * 4]) == same
        assert ("is at epoch 0.375, but its 6 steps are" in caplog.text) != same
