"""The names of upstream's `Trainer` that `hf_radam.trainer` overrides or calls exist and are called as expected.

Each is checked against the installed version of transformers, so that a failure names what an upgrade has changed. The
oracle for a call is what upstream really passes in a small training.
"""

import ast
import inspect
from pathlib import Path

import pytest
import tiny
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

from hf_radam import RAdamTrainerMixin

SOURCE = Path(inspect.getfile(RAdamTrainerMixin))
PRIVATE_OVERRIDES = {
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_output_dir": ["self", "trial"],
    "_maybe_log_save_evaluate": ["self", "tr_loss", "grad_norm", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_best_model": ["self"],
}
"""Private methods that are overridden, and how upstream's parameters begin."""
CALLED = {
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_scaler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_get_collator_with_removed_columns": ["self", "data_collator", "description"],
    "_prepare_inputs": ["self", "inputs"],
}
"""Private methods that are called, and how their parameters begin."""
PUBLIC_OVERRIDES = {
    "train": ["self", "resume_from_checkpoint", "trial"],
    "create_optimizer": ["self", "model"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "get_optimizer_cls_and_kwargs": ["args", "model"],
    "get_batch_samples": ["self", "epoch_iterator"],
    "evaluate": ["self", "eval_dataset"],
    "evaluation_loop": ["self", "dataloader", "description"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "log": ["self", "logs"],
    "create_model_card": ["self"],
    "call_model_init": ["self", "trial"],
    "hyperparameter_search": ["self", "hp_space", "compute_objective"],
}
ATTRIBUTES = (
    "_train_batch_size _created_lr_scheduler is_in_train is_fsdp_enabled is_deepspeed_enabled model_wrapped".split()
)


def method_nodes() -> dict[str, ast.FunctionDef]:
    (mixin,) = (
        node
        for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "RAdamTrainerMixin"
    )
    return {node.name: node for node in mixin.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", [*PRIVATE_OVERRIDES, *CALLED, *PUBLIC_OVERRIDES])
def test_upstream_has_the_method_with_these_parameters(name):
    expected = (PRIVATE_OVERRIDES | CALLED | PUBLIC_OVERRIDES)[name]
    found = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert found[: len(expected)] == expected


def test_these_are_all_private_overrides_and_each_is_short_and_passes_everything_on():
    overridden = {name: node for name, node in method_nodes().items() if hasattr(Trainer, name)}
    private = {name for name in overridden if name.startswith("_") and not name.startswith("__")}
    assert private == set(PRIVATE_OVERRIDES)
    assert set(overridden) - private - {"__init__"} == set(PUBLIC_OVERRIDES)
    for name in private:
        node = overridden[name]
        assert node.args.vararg is not None and node.args.kwarg is not None, name
        assert [argument.arg for argument in node.args.args] == ["self"], name
        texts = [ast.unparse(call) for call in ast.walk(node) if isinstance(call, ast.Call)]
        passing = (f"super().{name}(*args, **kwargs)", f"functools.partial(super().{name}, *args, **kwargs)")
        assert name == "_load_best_model" or any(text in passing for text in texts), name
        assert node.end_lineno - node.lineno + 1 <= 12, name


def test_no_other_class_of_the_package_overrides_upstream():
    package = SOURCE.parents[1]
    for file in package.rglob("*.py"):
        if file == SOURCE:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not any(
                    "Trainer" in ast.unparse(base)
                    and "Callback" not in ast.unparse(base)
                    and "Arguments" not in ast.unparse(base)
                    for base in node.bases
                ), f"{file}: {node.name}"


def test_attributes_exist(tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert [name for name in ATTRIBUTES if not hasattr(trainer, name)] == []


def test_events_and_calls_come_in_the_order_that_the_trainer_relies_on(tmp_path, monkeypatch):
    """Recorded in a stock training: loading before `on_train_begin`, the save inside `_maybe_log_save_evaluate`."""
    calls: list[str] = []

    def record(owner, name):
        method = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for name in ("create_optimizer", "create_scheduler", "_load_optimizer_and_scheduler", "get_batch_samples"):
        record(Trainer, name)
    for name in ("_maybe_log_save_evaluate", "save_model", "_save_checkpoint", "_get_output_dir"):
        record(Trainer, name)
    for name in ("on_train_begin", "on_optimizer_step", "on_step_end", "on_save", "on_log", "on_train_end"):
        record(CallbackHandler, name)
    args = tiny.stock_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train()
    args = tiny.stock_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    calls.clear()
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert calls == [
        *("create_optimizer", "create_scheduler", "_load_optimizer_and_scheduler", "on_train_begin"),
        *("get_batch_samples", "on_optimizer_step", "on_step_end", "_maybe_log_save_evaluate"),
        *("_save_checkpoint", "_get_output_dir", "save_model", "on_save"),
        *("_maybe_log_save_evaluate", "on_log", "_get_output_dir", "on_train_end"),
    ]
