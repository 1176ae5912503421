"""SIGTERM with upstream's `enable_jit_checkpoint`: the state is saved between two steps, and resumes bit for bit."""

import os
import signal

import pytest
import tiny
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_radam.trainer.callbacks import SigtermCallback


class Request(TrainerCallback):
    """Sends SIGTERM to this process in the middle of a step."""

    def __init__(self, trainer, step, event):
        self.step = step
        setattr(self, event, self.ask)

    def ask(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def sigterm_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def options(method):
    return tiny.METHODS[method] | {"gradient_accumulation_steps": 2, "enable_jit_checkpoint": True}


@pytest.mark.parametrize(
    ("event", "method"),
    [
        ("on_step_begin", "wsd_s"),
        ("on_substep_end", "schedule_free_ewa"),
        ("on_pre_optimizer_step", "ewa"),
        ("on_optimizer_step", "wsd"),
    ],
)
def test_a_request_at_any_moment_of_a_step_is_met_after_it(tmp_path, method, event):
    twin = tiny.trained(tmp_path / "twin", **options(method))
    for step in (3, 8):  # 8 is the last of its epoch
        folder = tmp_path / str(step)
        trainer = tiny.trainer(folder, **options(method))
        trainer.add_callback(Request(trainer, step, event))
        trainer.train()
        assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
        resumed = tiny.trained(folder, **options(method), resume=True)
        assert tiny.same(tiny.state(twin), tiny.state(resumed))


def test_the_evaluation_that_decides_about_saving_does_not_decide_about_this_save(tmp_path):
    """With `save_strategy="best"` an evaluation in that step says there is nothing to save."""
    strategy = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = tiny.trainer(tmp_path, **options("ewa"), **strategy, greater_is_better=True)  # the first is the best
    trainer.add_callback(Request(trainer, 5, "on_pre_optimizer_step"))
    trainer.train()
    assert trainer.state.global_step == 5 and (tmp_path / "checkpoint-5" / "hf_radam.json").is_file()


@pytest.mark.parametrize("save_steps", [3, 4])
def test_what_is_saved_can_be_resumed_though_other_checkpoints_have_no_optimizer(tmp_path, save_steps):
    trainer = tiny.trainer(
        tmp_path, **options("ewa"), save_strategy="steps", save_steps=save_steps, save_only_model=True
    )
    trainer.add_callback(Request(trainer, 4, "on_pre_optimizer_step"))
    trainer.train()
    resumed = tiny.trained(tmp_path, **options("ewa"), resume=tmp_path / "checkpoint-4")
    assert resumed.state.global_step == 20


def test_with_none_of_our_methods_the_callback_is_upstreams(tmp_path):
    trainer = tiny.trainer(tmp_path, enable_jit_checkpoint=True)
    assert JITCheckpointCallback in map(type, trainer.callback_handler.callbacks)
    before = signal.getsignal(signal.SIGTERM)
    own = tiny.trainer(tmp_path, enable_jit_checkpoint=True, ewa=True)
    kinds = [type(callback) for callback in own.callback_handler.callbacks]
    assert SigtermCallback in kinds and JITCheckpointCallback not in kinds
    assert signal.getsignal(signal.SIGTERM) == before  # upstream's is set while a trainer is made


def test_no_request_is_lost(tmp_path):
    """Also one that arrives after the flag was read: it is never reset while training."""
    trainer = tiny.trainer(tmp_path, **options("ewa"))
    read = trainer._sigterm.is_requested

    def late(args):
        answer = read(args)
        if trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    trainer._sigterm.is_requested = late
    trainer.train()
    assert trainer.state.global_step == 4 and (tmp_path / "checkpoint-4" / "hf_radam.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
