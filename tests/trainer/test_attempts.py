"""`auto_find_batch_size`: the attempt that succeeds is, bit for bit, the run that was started with its batch size.

The oracle is that plain run. Memory runs out as on a GPU, with torch's own error, where the batch has more rows than
allowed; upstream then tries 4, 3, 2 rows.
"""

import gc
import os
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_radam import RAdamScheduleFree, RAdamTrainer
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.training.attempts import BeforeTheFirstAttempt, _keep_loss_scale

SMALL = 2


class Limited:
    """In front of a trainer: from update `after` on more than `SMALL` rows do not fit, which shows after the work."""

    after = 7

    def training_step(self, model, inputs, *rest):
        loss = super().training_step(model, inputs, *rest)
        if len(inputs["input_ids"]) > SMALL and self.state.global_step >= self.after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


class LimitedTrainer(Limited, RAdamTrainer):
    """Ours, with little memory."""


class LimitedStockTrainer(Limited, Trainer):
    """Upstream's, with little memory."""


LOGGED = {"logging_strategy": "steps", "logging_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}


def run(cls, folder, build=tiny.llama, resume=None, optimizers=None, callbacks=None, **options):
    model = build()
    given = (None, None) if optimizers is None else optimizers(model)
    args = tiny.arguments(folder, **LOGGED | options)
    datasets = {"train_dataset": tiny.TRAIN, "eval_dataset": tiny.EVAL}
    trainer = cls(model, args, **datasets, optimizers=given, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.random = draws()
    return trainer


def draws() -> list[float]:
    """What the global generators give next."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def equal(a, b) -> bool:
    """Whether two nested states have the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def facts(trainer):
    """Everything that a run comes to, by name."""
    timed = re.compile("runtime|per_second")
    average = getattr(trainer, "average", None)
    return {
        "random": trainer.random,
        "weights": tiny.parameters(trainer.model),
        "buffers": dict(trainer.model.named_buffers()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "average": None if average is None else average.state_dict(),
        "history": [{k: v for k, v in e.items() if not timed.search(k)} for e in trainer.state.log_history],
        "files": sorted(p.relative_to(trainer.args.output_dir) for p in Path(trainer.args.output_dir).rglob("*")),
        "batch": trainer.state.train_batch_size,
        "loss": trainer.evaluate()["eval_loss"],
    }


def differing(one, other) -> list[str]:
    one, other = facts(one), facts(other)
    return [name for name in one if not equal(one[name], other[name])]


METHODS = tiny.METHODS | {
    "ewa_every": {"optim": "adamw_torch", "ewa": True, "ewa_decay": 0.9, "ewa_every": 3},
    "wsd_epochs": {"optim": "radam", "lr_scheduler_type": "wsd", "max_steps": -1, "num_train_epochs": 1.5},
}


@pytest.mark.parametrize("method", METHODS)
def test_failed_attempts_leave_no_trace(tmp_path, method):
    options = METHODS[method] | SAVED
    found = run(LimitedTrainer, tmp_path / "found", **options, auto_find_batch_size=True)
    planned = run(RAdamTrainer, tmp_path / "planned", **options, per_device_train_batch_size=SMALL)
    assert differing(found, planned) == []


def test_upstream_goes_on_with_used_weights(tmp_path):
    """The tests here can fail: the same comparison for upstream's own trainer."""
    runs = []
    for cls, options in (
        (LimitedStockTrainer, {"auto_find_batch_size": True}),
        (Trainer, {"per_device_train_batch_size": SMALL}),
    ):
        args = tiny.stock_arguments(tmp_path / cls.__name__, **LOGGED | SAVED | options)
        trainer = cls(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        trainer.random = draws()
        runs.append(trainer)
    assert {"random", "weights", "optimizer", "history", "loss"} <= set(differing(*runs))


@pytest.mark.parametrize("method", ["wsd", "ewa", "schedule_free_ewa"])
def test_resuming_too(tmp_path, method):
    options = METHODS[method] | SAVED
    run(RAdamTrainer, tmp_path / "first", **options)
    resume = tmp_path / "first" / "checkpoint-5"
    found = run(LimitedTrainer, tmp_path / "found", resume=resume, **options, auto_find_batch_size=True)
    planned = run(RAdamTrainer, tmp_path / "planned", resume=resume, **options, per_device_train_batch_size=SMALL)
    # What a run with auto_find_batch_size goes on with; a plain one keeps the checkpoint's number, and does not use it.
    assert differing(found, planned) == ["batch"]
    assert found.state.train_batch_size == SMALL


def test_a_run_goes_on_with_the_batch_size_that_it_found(tmp_path):
    options = METHODS["ewa"] | SAVED | {"auto_find_batch_size": True}
    whole = run(LimitedTrainer, tmp_path, **options)
    again = run(RAdamTrainer, tmp_path / "again", resume=tmp_path / "checkpoint-10", **options)
    assert again._train_batch_size == SMALL
    # Those of the first 10 updates are missing, and the last entry of the history has the mean loss of the others.
    assert set(differing(whole, again)) == {"files", "history"}


GIVEN = {
    "schedule_free": lambda model: (RAdamScheduleFree(model.parameters(), lr=1e-2, betas=(0.9, 0.95)), None),
    "tensor_lr": lambda model: (torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2)), None),
}


def with_schedule(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    halves = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.9**update)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3)
    return optimizer, torch.optim.lr_scheduler.ChainedScheduler([halves, constant], optimizer=optimizer)


GIVEN["with_schedule"] = with_schedule


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("used", [False, True])
def test_an_optimizer_of_the_users_begins_anew(tmp_path, given, used):
    """Fresh, or with the state of an earlier update in it."""

    def optimizers(model):
        optimizer, schedule = GIVEN[given](model)
        if used:
            model(**{k: v[None] for k, v in tiny.TRAIN[0].items()}).loss.backward()
            if isinstance(optimizer, RAdamScheduleFree):
                optimizer.train()
            optimizer.step()
        return optimizer, schedule

    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "ewa": True, "ewa_decay": 0.9}
    found = run(LimitedTrainer, tmp_path / "found", optimizers=optimizers, **options, auto_find_batch_size=True)
    planned = run(
        RAdamTrainer, tmp_path / "planned", optimizers=optimizers, **options, per_device_train_batch_size=SMALL
    )
    assert differing(found, planned) == []


def test_a_second_training_with_the_same_trainer(tmp_path):
    class Second(LimitedTrainer):
        after = 99

    runs = []
    for cls, options in ((Second, {"auto_find_batch_size": True}), (RAdamTrainer, {})):
        trainer = run(cls, tmp_path / cls.__name__, **METHODS["schedule_free_ewa"], **options)
        trainer.after = 7
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 4 if cls is Second else SMALL
        trainer.train()
        trainer.random = draws()
        runs.append(trainer)
    assert differing(*runs) == []


def test_a_model_init_begins_anew(tmp_path):
    runs = []
    for cls, options in (
        (LimitedTrainer, {"auto_find_batch_size": True}),
        (RAdamTrainer, {"per_device_train_batch_size": SMALL}),
    ):
        args = tiny.arguments(tmp_path / cls.__name__, **METHODS["ewa"], **LOGGED, **options)
        runs.append(cls(args=args, model_init=lambda: tiny.llama(), train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL))
        runs[-1].train()
        runs[-1].random = draws()
    assert differing(*runs) == []


class Normed(torch.nn.Module):
    """BatchNorm and a buffer that each forward pass binds anew, as rotary embeddings of a growing length do."""

    def __init__(self, size):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(size)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden):
        if self.training:
            self.seen = self.seen + len(hidden)
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)


def with_batch_norm():
    model = tiny.llama()
    model.model.norm = Normed(tiny.SIZES["hidden_size"])
    return model


def test_buffers_and_batch_norm_statistics(tmp_path):
    """The statistics of the average are taken from batches of the size that was found."""
    found = run(LimitedTrainer, tmp_path / "a", with_batch_norm, **METHODS["ewa"], **SAVED, auto_find_batch_size=True)
    small = {"per_device_train_batch_size": SMALL}
    planned = run(RAdamTrainer, tmp_path / "b", with_batch_norm, **METHODS["ewa"], **SAVED, **small)
    assert differing(found, planned) == []


def test_bf16_autocast_and_compilation(tmp_path):
    """Each attempt compiles the model for its own batch size alone; upstream compiles in the first one only."""
    kinds = []

    class Watched(LimitedTrainer):
        def training_step(self, model, *rest):
            kinds.append(type(model).__name__)
            return super().training_step(model, *rest)

    options = METHODS["ewa"] | {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager", "max_steps": 10}
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # of a graph that is there for another size
        found = run(Watched, tmp_path / "found", **options, auto_find_batch_size=True)
    assert set(kinds) == {"OptimizedModule"}
    planned = run(RAdamTrainer, tmp_path / "planned", **options, per_device_train_batch_size=SMALL)
    assert differing(found, planned) == []


class Patience(TrainerCallback, ExportableState):
    """Stops after the tenth update that it has seen."""

    def __init__(self):
        self.seen = 0

    def state(self):
        return {"args": {}, "attributes": {"seen": self.seen}}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen += 1
        control.should_training_stop = self.seen == 10


def test_a_callback_counts_anew(tmp_path):
    runs = [
        run(cls, tmp_path / cls.__name__, **METHODS["ewa"], **own, callbacks=[Patience()])
        for cls, own in (
            (LimitedTrainer, {"auto_find_batch_size": True}),
            (RAdamTrainer, {"per_device_train_batch_size": SMALL}),
        )
    ]
    assert [trainer.state.global_step for trainer in runs] == [10, 10]
    assert differing(*runs) == []


def test_checkpoints_of_a_failed_attempt_are_removed(tmp_path):
    """Epochs have fewer updates with 4 rows: checkpoint-16 is no update at which the smaller run saves."""
    options = METHODS["wsd_epochs"] | {"save_strategy": "epoch", "num_train_epochs": 2}

    class Late(LimitedTrainer):
        after = 20

    (tmp_path / "checkpoint-99").mkdir()  # of an earlier run: none of ours
    trainer = run(Late, tmp_path, **options, auto_find_batch_size=True)
    assert trainer.state.global_step == 64
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-32", "checkpoint-64", "checkpoint-99"]


def test_a_checkpoint_that_was_rotated_away_is_missed(tmp_path):
    options = METHODS["ewa"] | SAVED
    run(RAdamTrainer, tmp_path, **options, max_steps=5)

    class Late(LimitedTrainer):
        after = 12

    with pytest.raises(CheckpointError, match="checkpoint-5 was removed .save_total_limit. by an attempt"):
        run(
            Late,
            tmp_path,
            resume=tmp_path / "checkpoint-5",
            **options,
            save_total_limit=1,
            auto_find_batch_size=True,
        )
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]


def test_parameters_that_thaw_are_refused(tmp_path):
    class Thaw(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.model.embed_tokens.requires_grad_(True)

    with pytest.raises(RuntimeError, match="model.embed_tokens.weight was frozen before training"):
        run(
            LimitedTrainer,
            tmp_path,
            tiny.partly_frozen,
            **METHODS["wsd"],
            auto_find_batch_size=True,
            callbacks=[Thaw()],
        )


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_kept_is_released(tmp_path, fails):
    kept = []

    class Watched(LimitedTrainer):
        after = 3

        def training_step(self, *args):
            if not kept:
                assert isinstance(self._before_the_first_attempt, BeforeTheFirstAttempt)
                kept.append(weakref.ref(self._before_the_first_attempt))
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().training_step(*args)

    args = tiny.arguments(tmp_path, **METHODS["ewa"], auto_find_batch_size=True, max_steps=5)
    trainer = Watched(tiny.llama(), args, train_dataset=tiny.TRAIN)
    if fails:
        with pytest.raises(RuntimeError, match="No executable batch size found"):
            trainer.train()
    else:
        trainer.train()
    gc.collect()
    assert kept[0]() is None


def test_other_errors_are_not_tried_again(tmp_path):
    class Broken(RAdamTrainer):
        calls = 0

        def training_step(self, *args):
            self.calls += 1
            raise RuntimeError("something else")

    args = tiny.arguments(tmp_path, **METHODS["ewa"], auto_find_batch_size=True)
    trainer = Broken(tiny.llama(), args, train_dataset=tiny.TRAIN)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()
    assert trainer.calls == 1 and trainer._before_the_first_attempt is None


def test_the_loss_scale_of_fp16_is_put_back():
    """A scaler of torch's own, as accelerate keeps it; the CPU has one that works like the GPU's."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    put_back = _keep_loss_scale(scaler)
    for _ in range(2):
        scaler.scale(parameter.sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        scaler.unscale_(optimizer)  # memory runs out between this and the step
        put_back()
        assert scaler.get_scale() == 1024.0


def test_several_processes_are_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = "import sys, tiny\ntiny.trainer(sys.argv[1], **tiny.METHODS['ewa'], auto_find_batch_size=True)"
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "ValueError: auto_find_batch_size with several processes" in done.stderr
