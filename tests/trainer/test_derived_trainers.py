"""Trainers that users derive, trials that turn a method on, and runs in a folder that another run has used."""

import hashlib
import signal
from functools import partial

import pytest
import test_search
import tiny
import torch
from transformers import Seq2SeqTrainer, TrainerCallback

from hf_radam import RAdam, RAdamScheduleFree, RAdamTrainer, RAdamTrainerMixin
from hf_radam.checkpoints.manifest import read_manifest
from hf_radam.checkpoints.storage import run_lock
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.trainer.callbacks import SigtermCallback

SAVED = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 4}


def made(kind, folder, **options):
    return kind(tiny.llama(), tiny.arguments(folder, **options), train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)


class OwnOptimizer(RAdamTrainer):
    kind = RAdam

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = self.kind(self.model.parameters(), lr=0.01)
        return self.optimizer


def test_an_overridden_create_optimizer_skips_no_check(tmp_path, monkeypatch):
    trainer = made(OwnOptimizer, tmp_path, ewa=True, load_best_model_at_end=True, **SAVED, **EVALUATED)
    trainer.train()
    with pytest.raises(RuntimeError, match="holds the best evaluation weights"):
        trainer.train()
    late = {"num_train_epochs": 0.5, "max_steps": -1, "ewa_start_step": 50}
    with pytest.raises(ValueError, match="leave no averaging in a run of 8 steps"):
        made(OwnOptimizer, tmp_path / "late", ewa=True, **late).train()
    monkeypatch.setattr(OwnOptimizer, "kind", RAdamScheduleFree)
    with pytest.raises(ValueError, match="made a RAdamScheduleFree. Use --optim radam_schedulefree"):
        made(OwnOptimizer, tmp_path / "free", lr_scheduler_type="constant", max_steps=2).train()


def test_an_overridden_create_scheduler_resumes(tmp_path):
    class OwnSchedule(RAdamTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda step: 1.0)
            return self.lr_scheduler

    options = {"ewa": True, "adam_beta2": 0.9} | SAVED
    whole = made(OwnSchedule, tmp_path / "run", **options)
    whole.train()
    resumed = made(OwnSchedule, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert tiny.same(tiny.state(whole), tiny.state(resumed))


def test_a_trainer_with_arguments_of_its_own_says_so(tmp_path):
    class OwnArguments(RAdamTrainerMixin, Seq2SeqTrainer):
        pass

    with pytest.raises(TypeError, match="OwnArguments needs arguments of a class of its own. Make them with"):
        made(OwnArguments, tmp_path, ewa=True)


def test_a_method_that_a_trial_turns_on_is_checked(tmp_path, request):
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM)))
    made_of = {"metric_for_best_model": "raw_loss", "load_best_model_at_end": True, **SAVED, **EVALUATED}
    with pytest.raises(ValueError, match="metric_for_best_model=raw_loss is of the training weights"):
        test_search.trainer(tmp_path / "alone", ewa=True, ewa_eval_raw=True, **made_of)
    searched = test_search.trainer(tmp_path, enable_jit_checkpoint=True, **made_of)
    with pytest.raises(ValueError, match="metric_for_best_model=raw_loss is of the training weights"):
        test_search.search(searched, {"ewa": [True], "ewa_eval_raw": [True]})
    plain = test_search.trainer(tmp_path / "plain", enable_jit_checkpoint=True, max_steps=2)
    with run_lock(tmp_path / "plain"):  # of another worker of the same study, whose trials have folders of their own
        test_search.search(plain, {"ewa": [True]}, compute_objective=lambda metrics: 0.0)
    assert isinstance(plain._sigterm, SigtermCallback)


def test_a_stock_run_writes_over_no_pinned_checkpoint(tmp_path):
    method = tiny.METHODS["wsd"] | {"decay_steps": 4}
    tiny.trained(tmp_path, **method, **SAVED)
    tiny.trained(tmp_path, optim="adamw_torch", lr_scheduler_type="constant", **SAVED)
    assert verify_checkpoint(tmp_path / "_pre_decay/checkpoint-4") == {}
    assert read_manifest(tmp_path / "checkpoint-4") is None and not (tmp_path / "checkpoint-8/ewa").exists()
    pinned = str(tmp_path / "_pre_decay/checkpoint-4")
    assert tiny.trained(tmp_path / "longer", extend_from=pinned, **method | {"max_steps": 12}).state.global_step == 12


def hashes(folder):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("method", ["wsd_s", "ewa"])
def test_resuming_a_finished_run_writes_nothing_into_its_checkpoints(tmp_path, method):
    options = tiny.METHODS[method] | SAVED | EVALUATED | {"load_best_model_at_end": True, "budgets": None}
    tiny.trained(tmp_path, **options)
    before = hashes(tmp_path)
    tiny.trained(tmp_path, resume=True, **options)
    assert hashes(tmp_path) == before


def test_a_prediction_in_a_callback_is_of_the_evaluation_weights_alone(tmp_path):
    class Predicts(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            found.append({name for name in trainer.predict(tiny.EVAL).metrics if name.endswith("loss")})

    found = []
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], ewa_eval_raw=True, **EVALUATED | {"max_steps": 4})
    trainer.add_callback(Predicts())
    trainer.train()
    assert found == [{"test_loss"}]
