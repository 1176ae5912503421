"""Saving and evaluating leave a run as it was, and a resumed run is its uninterrupted twin: compared bit for bit."""

import logging
import re
import shutil

import pytest
import tiny
import torch
from transformers import Trainer

from hf_radam import RAdamTrainer
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.trainer.resume import epochs_after


def assert_same(one, other):
    assert tiny.same(tiny.state(one), tiny.state(other))


@pytest.mark.parametrize("method", tiny.METHODS)
def test_evaluating_and_saving_change_nothing(tmp_path, method):
    quiet = tiny.trained(tmp_path / "quiet", **tiny.METHODS[method])
    for every in (1, 7):
        busy = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
        assert_same(quiet, tiny.trained(tmp_path / str(every), **tiny.METHODS[method], **busy, eval_on_start=True))


def test_the_test_above_can_fail(tmp_path):
    """Stock evaluation draws from the global random state, and with dropout that changes the rest of the run."""
    runs = []
    for strategy in ("no", "steps"):
        args = tiny.stock_arguments(tmp_path / strategy, eval_strategy=strategy, eval_steps=1)
        trainer = Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        runs.append(tiny.parameters(trainer.model))
    assert not tiny.same(*runs)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, (3, 8, 10, 14, 18, 20)), (2, (8, 18))])
@pytest.mark.parametrize("method", tiny.METHODS)
def test_resuming_is_bitwise_in_every_phase(tmp_path, method, accumulation, steps):
    """Warm-up, stable phase, both decays of WSD-S, a budget, between averagings, ends of epochs and of the run."""
    options = tiny.METHODS[method] | {"gradient_accumulation_steps": accumulation, "warmup_steps": 4}
    twin = tiny.trained(tmp_path, **options, save_strategy="steps", save_steps=1)
    loss = twin.evaluate()["eval_loss"]
    for step in steps:
        again = tiny.trained(tmp_path / "resumed", **options, resume=tmp_path / f"checkpoint-{step}")
        assert_same(twin, again)
        assert again.state.global_step == 20 and again.evaluate()["eval_loss"] == loss


class OfTwo(tiny.LlamaForCausalLM):
    """A model that is not made from a configuration alone."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def of_two():
    torch.manual_seed(0)
    return OfTwo(tiny.LlamaConfig(**tiny.SIZES), extra=1)


@pytest.mark.parametrize("build", [tiny.mixtral, tiny.tied, tiny.bf16, tiny.partly_frozen, tiny.float64, of_two])
def test_resuming_is_bitwise_for_other_models(tmp_path, build):
    options = {"optim": "adamw_torch", "ewa": True, "ewa_every": 2, "save_strategy": "steps", "save_steps": 7}
    twin = tiny.trained(tmp_path, build(), **options)
    assert_same(twin, tiny.trained(tmp_path / "again", build(), **options, resume=tmp_path / "checkpoint-7"))


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
        paths = [path for path in sorted((tmp_path / cls.__name__).rglob("*")) if path.is_file()]
        files = {path.relative_to(tmp_path / cls.__name__): path.read_bytes() for path in paths}
        for path in files:
            if path.name in ("training_args.bin", "trainer_state.json"):  # these name the class, the folder and times
                files[path] = b""
        runs.append((tiny.parameters(trainer.model), history, files, torch.get_rng_state().tolist()))
    assert tiny.same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


SAVED = {"save_strategy": "steps", "save_steps": 10}
EWA, WSD = tiny.METHODS["ewa"] | SAVED, tiny.METHODS["wsd"] | SAVED
STOCK = {"optim": "adamw_torch", "lr_scheduler_type": "constant"} | SAVED


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of finished runs with checkpoints after 10 and 20 steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("ewa", EWA), ("wsd", WSD), ("stock", STOCK), ("warm", EWA | {"warmup_steps": 15})):
        tiny.trained(folder / name, **options)
    return folder


CONSTANT = {"optim": "radam", "lr_scheduler_type": "constant", "max_steps": 40}
REFUSED = [
    ("wsd/checkpoint-10", WSD | {"learning_rate": 2e-2}, "trained with learning_rate=0.01, the arguments say 0.02"),
    ("wsd/checkpoint-10", WSD | {"weight_decay": 0.2}, "trained with weight_decay=0.1, the arguments say 0.2"),
    ("wsd/checkpoint-10", WSD | {"adam_beta2": 0.99}, "trained with betas=(0.9, 0.95), the arguments say (0.9, 0.99)"),
    ("wsd/checkpoint-10", WSD | {"optim": "adamw_torch"}, "trained with optim=radam, the arguments say adamw_torch"),
    ("wsd/checkpoint-10", WSD | {"decay_steps": 14}, "is at step 10 with learning rate 0.01, but the schedule of"),
    ("wsd/checkpoint-10", WSD | {"max_steps": 14}, "is at step 10 with learning rate 0.01"),
    ("wsd/checkpoint-20", CONSTANT, "is at step 20 with learning rate 0, but the schedule of these arguments has 0.01"),
    ("wsd/checkpoint-20", CONSTANT | {"lr_scheduler_type": "cosine"}, "is at step 20 with learning rate 0"),
    ("warm/checkpoint-10", EWA | {"warmup_steps": 5}, "is at step 10 with learning rate 0.00666667"),
    ("ewa/checkpoint-10", EWA | {"ewa_start_step": 5}, "trained with ewa_start_step=0, the arguments say 5"),
    ("stock/checkpoint-10", STOCK | {"optim": "radam"}, "trained with another optimizer: its parameter groups differ"),
    ("ewa", EWA, "has no trainer_state.json. Give the folder of a checkpoint"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ewa/model.safetensors", "ewa/model.safetensors is missing"),
        ("optimizer.pt", "optimizer.pt is missing"),
        ("hf_radam.json", "has ewa/ but no hf_radam.json: it is damaged or incomplete"),
    ],
)
def test_incomplete_checkpoints_are_refused(tmp_path, runs, name, message):
    copy = shutil.copytree(runs / "ewa/checkpoint-10", tmp_path / "copy" / "checkpoint-10")
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(message)):
        tiny.trained(tmp_path, resume=copy, **EWA)


def test_a_stock_checkpoint_without_an_optimizer_is_refused(tmp_path, runs):
    copy = shutil.copytree(runs / "stock/checkpoint-10", tmp_path / "copy" / "checkpoint-10")
    (copy / "optimizer.pt").unlink()  # as save_only_model leaves it
    with pytest.raises(CheckpointError, match="has no optimizer.pt, so it cannot be resumed"):
        tiny.trained(tmp_path, resume=copy, **STOCK, ewa=True)


def test_a_dropped_or_changed_average_is_logged(tmp_path, runs, caplog):
    tiny.trained(tmp_path / "a", resume=runs / "ewa/checkpoint-10", **EWA, ewa_every=2)
    assert "the average continues with another window (old, new): {'every': (1, 2)}" in caplog.text
    tiny.trained(tmp_path / "b", resume=runs / "ewa/checkpoint-10", optim="radam", lr_scheduler_type="constant")
    assert "has an average, and ewa is off: it ends here" in caplog.text


class Stream(torch.utils.data.IterableDataset):
    """Data without a length: an epoch has 16 steps of 4 sequences."""

    def __iter__(self):
        return iter(tiny.TRAIN)


def test_streaming_data_resumes_bitwise_in_its_first_epoch_and_is_refused_later(tmp_path):
    def streamed(folder, resume=None):
        args = tiny.arguments(folder, **tiny.METHODS["ewa"], max_steps=24, save_strategy="steps", save_steps=6)
        trainer = RAdamTrainer(tiny.llama(), args, train_dataset=Stream())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = streamed(tmp_path)
    assert_same(whole, streamed(tmp_path / "again", str(tmp_path / "checkpoint-12")))
    with pytest.raises(CheckpointError, match="is in epoch 2 of a train_dataset without a length"):
        streamed(tmp_path / "late", str(tmp_path / "checkpoint-18"))


def test_more_steps_may_be_asked_for_while_the_schedule_is_stable(tmp_path, runs):
    options = tiny.METHODS["wsd"] | {"max_steps": 30}
    longer = tiny.trained(tmp_path / "longer", **options, resume=runs / "wsd/checkpoint-10")
    assert_same(longer, tiny.trained(tmp_path / "planned", **options))


# ---- The place in the data ----


class Counted(list):
    """Data that keeps the order in which it is asked."""

    def __init__(self, rows):
        super().__init__(rows)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def samples_of(folder, resume=None, **options):
    """Train; returns the samples in the order in which they were asked for."""
    trainer = tiny.trainer(folder, optim="radam", max_steps=12, **options)
    trainer.train_dataset = Counted(tiny.TRAIN)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.train_dataset.asked


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The folder of a run of 12 steps with a checkpoint after 6, and the samples in the order of their use."""
    folder = tmp_path_factory.mktemp("first")
    return folder, samples_of(folder, save_strategy="steps", save_steps=6)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4), (2, 1), (4, 2)])
def test_the_place_in_the_data(tmp_path, counted, caplog, batch, accumulation):
    folder, order = counted
    with caplog.at_level(logging.WARNING):
        resumed = samples_of(
            tmp_path / "new",
            str(folder / "checkpoint-6"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
    same = resumed[:4] == order[6 * 4 : 7 * 4]
    assert same == (batch * accumulation == 4)
    warned = "is at epoch 0.375, but its 6 steps are" in caplog.text
    assert warned != same


def test_epochs_after_steps():
    assert epochs_after(5, batches_per_epoch=10, accumulation=1) == 0.5
    assert epochs_after(5, batches_per_epoch=9, accumulation=2) == 1.0  # the fifth step has one batch
    assert epochs_after(7, batches_per_epoch=9, accumulation=2) == 1 + 4 / 9
