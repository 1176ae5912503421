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


ONLY_MODELS = {"save_strategy": "steps", "save_only_model": True}
# An evaluation in that step says that there is nothing to save: the first is the best.
BEST = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}


@pytest.mark.parametrize(
    ("event", "method", "step", "saving"),
    [
        ("on_step_begin", "wsd_s", 8, {}),  # the last of its epoch
        ("on_substep_end", "schedule_free_ewa", 8, {}),
        ("on_pre_optimizer_step", "ewa", 3, BEST | {"greater_is_better": True}),
        ("on_optimizer_step", "wsd", 4, ONLY_MODELS | {"save_steps": 3}),
        ("on_optimizer_step", "ewa", 4, ONLY_MODELS | {"save_steps": 4}),
    ],
)
def test_a_request_at_any_moment_of_a_step_is_met_after_it(tmp_path, method, event, step, saving):
    """Whatever the strategy says about saving: what is saved can be resumed."""
    twin = tiny.trained(tmp_path / "twin", **options(method))
    trainer = tiny.trainer(tmp_path / "run", **options(method), **saving)
    trainer.add_callback(Request(trainer, step, event))
    trainer.train()
    assert trainer.state.global_step == step
    assert saving or [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    resumed = tiny.trained(tmp_path / "run", **options(method), resume=tmp_path / "run" / f"checkpoint-{step}")
    assert tiny.same(tiny.state(twin), tiny.state(resumed))


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
