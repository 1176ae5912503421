"""Whether a training fuses its updates: as asked for, or where it is possible, and measured to be faster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_fused import OPTIONS, make, parameters
from transformers import TrainerCallback

from hf_radam import RAdam, RAdamScheduleFree, RAdamTrainer, kernels
from hf_radam.sharding import LocalSharding
from hf_radam.training.fusing import choose_fused

pytestmark = pytest.mark.skipif(kernels.building.why_not() is not None, reason=str(kernels.building.why_not()))


def sharding_of(given):
    return LocalSharding((str(number), p) for number, p in enumerate(given))


def chosen(caplog, given, wanted, kind=RAdamScheduleFree):
    optimizer = make(kind, given)
    caplog.clear()
    with caplog.at_level("INFO", logger="hf_radam"):
        choose_fused(optimizer, wanted, sharding_of(given), speaks=True)
    return optimizer.fused, " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", OPTIONS)
def test_auto_fuses_what_it_can_and_says_so(kind, caplog):
    assert chosen(caplog, parameters(), "auto", kind)[0]
    assert "updates are fused" in caplog.records[-1].getMessage()
    assert chosen(caplog, parameters(), "true", kind)[0]
    assert chosen(caplog, parameters(), "false", kind) == (False, "")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (torch.zeros(10, device="meta"), "there is no kernel for meta"),
        (torch.zeros(10, dtype=torch.complex64), "a parameter is complex64"),
    ],
)
def test_what_cannot_be_fused_is_said(given, reason, caplog):
    p = [torch.nn.Parameter(given)]
    assert chosen(caplog, p, "auto", RAdam) == (
        False,
        f"The optimizer's updates are not fused (fused_optimizer=auto): {reason}.",
    )
    with pytest.raises(ValueError, match=f"fused_optimizer=true is not possible: {reason}"):
        chosen(caplog, p, "true", RAdam)


def test_what_nobody_has_measured_is_only_done_when_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "MEASURED", ())
    fused, said = chosen(caplog, parameters(), "auto")
    assert not fused and "not measured on cpu; fused_optimizer=true does it all the same" in said
    assert chosen(caplog, parameters(), "true")[0]


WITHOUT_COMPILER = """
import torch
from hf_radam import RAdam, RAdamScheduleFree
from hf_radam.sharding import LocalSharding
from hf_radam.training.fusing import choose_fused
p = [torch.nn.Parameter(torch.zeros(20))]
where = LocalSharding([("p", p[0])])
for kind in (RAdam, RAdamScheduleFree):
    optimizer = kind(p, lr=0.1)
    choose_fused(optimizer, "auto", where, speaks=True)
    print(kind.__name__, optimizer.fused)
choose_fused(optimizer, "true", where, speaks=True)
"""


def test_without_a_compiler_auto_goes_on_and_true_is_an_error(tmp_path):
    """In an environment in which no program can be found, and nothing was compiled before."""
    environment = {
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["RAdam", "False", "RAdamScheduleFree", "False"], done.stderr
    assert "are not fused (fused_optimizer=auto): there is no C++ compiler" in done.stderr
    assert "ValueError: fused_optimizer=true is not possible: there is no C++ compiler" in done.stderr


# ---- In a training ----


@pytest.mark.parametrize("method", ["wsd", "schedule_free_ewa"])
def test_a_fused_run_resumes_bit_for_bit(method, tmp_path):
    options = tiny.METHODS[method] | {"fused_optimizer": "true", "save_strategy": "steps", "save_steps": 10}
    runs = {}
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-10"))):
        trainer = RAdamTrainer(tiny.llama(), tiny.arguments(tmp_path / name, **options), train_dataset=tiny.TRAIN)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer._bare_optimizer.fused
        runs[name] = tiny.parameters(trainer.model)
    assert tiny.same(runs["whole"], runs["resumed"])
    plain = RAdamTrainer(
        tiny.llama(),
        tiny.arguments(tmp_path / "plain", **options | {"fused_optimizer": "false"}),
        train_dataset=tiny.TRAIN,
    )
    plain.train()
    assert not plain._bare_optimizer.fused
    assert not tiny.same(runs["whole"], tiny.parameters(plain.model))


# ---- The average in the update's pass ----


class Watch(TrainerCallback):
    """Counts the averages that moved with an update; or writes to a weight before it is averaged."""

    def __init__(self, *, meddles=False):
        self.meddles = meddles
        self.moved = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.moved.append(len(self.trainer.average._foldings.moved))
        if self.meddles and state.global_step == 8:
            with torch.no_grad():
                next(model.parameters()).mul_(0.5)


def run_with_average(folder, *, watch=None, **options):
    watch = watch or Watch()
    options = {"optim": "radam_schedulefree", "ewa": True, "fused_optimizer": "true"} | options
    trainer = RAdamTrainer(tiny.llama(), tiny.arguments(folder, **options), train_dataset=tiny.TRAIN, callbacks=[watch])
    watch.trainer = trainer
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("options", [{}, {"optim": "radam"}, {"ewa_every": 3, "ewa_start_step": 2}], ids=str)
def test_a_folded_average_is_the_same_bit_for_bit(options, tmp_path):
    """Oracle: the run without, whose average moves in a pass of its own."""
    folded, watch = run_with_average(tmp_path / "folded", ewa_folded=True, **options)
    apart, other = run_with_average(tmp_path / "apart", **options)
    assert tiny.same(tiny.parameters(folded.model), tiny.parameters(apart.model))
    assert folded.average.counters() == apart.average.counters()
    assert tiny.same(folded.average.state_dict()["averages"], apart.average.state_dict()["averages"])
    assert not any(other.moved)
    every, start = options.get("ewa_every", 1), options.get("ewa_start_step", 0)
    due = [(n - start) % every == 0 and n - start > every for n in range(1, len(watch.moved) + 1)]
    # Before the rectification is defined updates are not fused: in torch's RAdam for one update longer.
    begun = [n > (5 if "optim" in options else 4) for n in range(1, len(watch.moved) + 1)]
    count = len(folded.average.state_dict()["averages"])
    assert watch.moved == [count if d and b else 0 for d, b in zip(due, begun, strict=True)] and any(watch.moved)


def test_weights_written_after_the_folded_average_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="written to model.embed_tokens.weight between .* leave out fold_into"):
        run_with_average(tmp_path, watch=Watch(meddles=True), ewa_folded=True)
    run_with_average(tmp_path / "apart", watch=Watch(meddles=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fused_optimizer": "false"}, "ewa_folded=True with optim=radam_schedulefree, fused_optimizer=false"),
        ({"optim": "adamw_torch", "fused_optimizer": "auto"}, "ewa_folded=True with optim=adamw_torch"),
        ({"ewa": False}, "ewa_folded=True has no effect without ewa"),
    ],
)
def test_folding_what_cannot_be_is_refused(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        run_with_average(tmp_path, ewa_folded=True, **options)


def test_folding_where_nothing_was_fused_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "MEASURED", ())
    with pytest.raises(ValueError, match="not possible: the optimizer's updates are not fused"):
        run_with_average(tmp_path, ewa_folded=True, fused_optimizer="auto")


class Evaluates(TrainerCallback):
    """Evaluates between an update and its average, as no callback should."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step % 4 == 2:
            self.losses = self.trainer.evaluate()


def test_evaluating_between_a_folded_update_and_its_average_changes_nothing(tmp_path):
    ends = []
    for folded in (True, False):
        watch = Evaluates()
        trainer = RAdamTrainer(
            tiny.llama(),
            tiny.arguments(tmp_path / str(folded), optim="radam", ewa=True, ewa_folded=folded),
            train_dataset=tiny.TRAIN,
            eval_dataset=tiny.TRAIN,
            callbacks=[watch],
        )
        watch.trainer = trainer
        trainer.train()
        assert watch.losses["eval_loss"] > 0
        ends.append((tiny.parameters(trainer.model), trainer.average.averaged_state_dict(), trainer.average.counters()))
    assert tiny.same(ends[0][0], ends[1][0]) and tiny.same(ends[0][1], ends[1][1]) and ends[0][2] == ends[1][2]
