"""Whether a training fuses its updates: as asked for, or where it is possible, measured and worth its compiling."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_fused import OPTIONS, make, parameters

from hf_radam import RAdam, RAdamScheduleFree, RAdamTrainer
from hf_radam.optim import fused
from hf_radam.sharding import LocalSharding
from hf_radam.training.fusing import choose_fused

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)


def sharding_of(given):
    return LocalSharding((str(number), p) for number, p in enumerate(given))


def chosen(caplog, given, wanted, kind=RAdamScheduleFree):
    optimizer = make(kind, given)
    caplog.clear()
    with caplog.at_level("INFO", logger="hf_radam"):
        choose_fused(optimizer, wanted, sharding_of(given), speaks=True)
    return optimizer.fused, " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", OPTIONS)
def test_auto_is_for_models_that_are_worth_it(kind, caplog):
    small = [torch.nn.Parameter(torch.zeros(fused.WORTH_IT // 3 - 1)) for _ in range(3)]
    large = [torch.nn.Parameter(torch.zeros(fused.WORTH_IT // 3 + 1)) for _ in range(3)]
    assert chosen(caplog, small, "auto", kind) == (False, "")
    assert chosen(caplog, small, "true", kind)[0] and chosen(caplog, large, "auto", kind)[0]
    assert "updates are fused" in caplog.records[-1].getMessage()
    assert chosen(caplog, large, "false", kind) == (False, "")


def test_what_cannot_be_fused_is_said():
    meta = [torch.nn.Parameter(torch.zeros(fused.WORTH_IT, device="meta")) for _ in range(3)]
    for optimizer in (make(RAdam, meta), make(RAdamScheduleFree, meta)):
        choose_fused(optimizer, "auto", sharding_of(meta), speaks=True)
        assert not optimizer.fused
        with pytest.raises(ValueError, match="fused_optimizer=true is not possible: there is no kernel for meta"):
            choose_fused(optimizer, "true", sharding_of(meta), speaks=True)


def test_what_nobody_has_measured_is_only_done_when_asked_for(monkeypatch):
    given = [torch.nn.Parameter(torch.zeros(fused.WORTH_IT))]
    monkeypatch.setattr(fused, "MEASURED", ())
    optimizer = make(RAdam, [*given, *parameters()[:2]])
    choose_fused(optimizer, "auto", sharding_of(given), speaks=True)
    assert not optimizer.fused
    choose_fused(optimizer, "true", sharding_of(given), speaks=True)
    assert optimizer.fused


WITHOUT_COMPILER = """
import torch
from hf_radam import RAdam, RAdamScheduleFree
from hf_radam.sharding import LocalSharding
from hf_radam.training.fusing import choose_fused
p = [torch.nn.Parameter(torch.zeros(20_000_000))]
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
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["RAdam", "True", "RAdamScheduleFree", "False"], done.stderr
    assert "are not fused (fused_optimizer=auto): compiling failed" in done.stderr
    assert "ValueError: fused_optimizer=true is not possible: compiling failed" in done.stderr


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
