"""What `evaluate()` reports is what ships: every way to load the evaluation weights gives the same loss.

The oracle is a plain forward pass over the evaluation data, without a trainer (`tiny.loss_of`).
"""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer

from hf_radam import RAdamTrainer, load_evaluation_model
from hf_radam.checkpoints.load import newest_loadable_checkpoint
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest

# The mean of 16 fp32 losses in other batches: a few roundings of 6e-8 on values of size 4.
CLOSE = 2e-6
FOLDERS = {"ewa": "ewa", "schedule_free": "schedule_free", "schedule_free_ewa": "ewa"}


@pytest.mark.parametrize("method", tiny.METHODS)
def test_evaluate_is_what_ships(tmp_path, method):
    options = tiny.METHODS[method]
    every = {"save_strategy": "steps", "save_steps": 15, "eval_strategy": "steps", "eval_steps": 5}
    trainer = tiny.trained(tmp_path, **options, **every, ewa_eval_raw="ewa" in options)
    history = trainer.state.log_history
    (reported,) = (entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == 15)
    checkpoint = tmp_path / "checkpoint-15"
    assert tiny.loss_of(load_evaluation_model(checkpoint)) == pytest.approx(reported, abs=CLOSE)
    folder = checkpoint / (FOLDERS.get(method) or ".")
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(folder)) == pytest.approx(reported, abs=CLOSE)
    assert read_manifest(checkpoint)["evaluation"]["folder"] == FOLDERS.get(method)
    assert (checkpoint / "ewa").is_dir() == ("ewa" in options)
    assert (checkpoint / "schedule_free").is_dir() == (options["optim"] == "radam_schedulefree")
    # save_model(), the folder of the run, and predict()
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    trainer.save_model()
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(loss, abs=CLOSE)
    assert tiny.loss_of(load_evaluation_model(tmp_path)) == pytest.approx(loss, abs=CLOSE)
    predicted = trainer.predict(tiny.EVAL).metrics
    assert predicted["test_loss"] == pytest.approx(loss, abs=CLOSE) and "test_raw_loss" not in predicted
    with trainer.evaluation_weights():
        assert tiny.loss_of(trainer.model) == pytest.approx(loss, abs=CLOSE)
    # ... which are not the training weights, that the checkpoint's root holds
    if FOLDERS.get(method):
        raw = tiny.loss_of(AutoModelForCausalLM.from_pretrained(checkpoint))
        assert abs(raw - reported) > 100 * CLOSE
    # Beside an average the training weights are evaluated, of a schedule-free run y
    assert ("eval_raw_loss" in metrics) == ("ewa" in options)
    if "ewa" in options:
        raw = tiny.loss_of(trainer.model)
        assert metrics["eval_raw_loss"] == pytest.approx(raw, abs=CLOSE) and metrics["eval_raw_loss"] != loss
        both = trainer.evaluate({"a": tiny.EVAL, "b": tiny.EVAL[:4]})
        assert both["eval_a_raw_loss"] == pytest.approx(raw, abs=CLOSE)
        assert {"eval_a_loss", "eval_b_loss", "eval_b_raw_loss"} <= set(both) and "eval_raw_loss" not in both


KINDS = [("ewa", build) for build in (tiny.mixtral, tiny.tied, tiny.bf16, tiny.partly_frozen)]


@pytest.mark.parametrize(("method", "build"), [*KINDS, ("schedule_free", tiny.mixtral)])
def test_other_kinds_of_model_ship_and_resume_bitwise(tmp_path, method, build):
    options = tiny.METHODS[method] | ({"optim": "adamw_torch"} if build is tiny.bf16 else {})
    trainer = tiny.trained(tmp_path, build(), **options, save_strategy="steps", save_steps=10)
    loss = trainer.evaluate()["eval_loss"]
    # bf16 logits of other batch shapes: 3 significant digits
    close = 2e-2 if build is tiny.bf16 else CLOSE
    shipped = load_evaluation_model(tmp_path / "checkpoint-20")
    assert shipped.dtype == trainer.model.dtype
    assert tiny.loss_of(shipped) == pytest.approx(loss, abs=close)
    with trainer.evaluation_weights():
        assert tiny.same(tiny.parameters(shipped), tiny.parameters(trainer.model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20" / method)
    assert plain.dtype == torch.float32  # also for a bf16 model: the average is kept in fp32
    assert tiny.loss_of(plain) == pytest.approx(loss, abs=close)
    again = tiny.trained(tmp_path / "again", build(), **options, resume=tmp_path / "checkpoint-10")
    assert tiny.same(tiny.state(trainer), tiny.state(again))


def test_before_the_first_averaging_the_training_weights_are_evaluated(tmp_path, caplog):
    options = tiny.METHODS["ewa"] | {"ewa_start_step": 12}
    trainer = tiny.trainer(tmp_path, **options, save_strategy="steps", save_steps=10)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(tiny.loss_of(tiny.llama()), abs=CLOSE)
    trainer.train()
    assert not (tmp_path / "checkpoint-10" / "ewa").exists()
    manifest = read_manifest(tmp_path / "checkpoint-10")
    assert manifest["evaluation"]["folder"] is None and manifest["averaging"]["num_averaged"] == 0
    assert (tmp_path / "checkpoint-20" / "ewa").is_dir()
    root = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")
    assert tiny.same(tiny.parameters(root), tiny.parameters(load_evaluation_model(tmp_path / "checkpoint-10")))


def test_a_model_of_two_dtypes_ships_as_it_was_evaluated(tmp_path):
    for method, name in (("ewa", "a"), ("wsd", "b")):
        model = tiny.bf16()
        model.model.layers[0].mlp.float()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0].float(),))
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output.bfloat16())
        options = tiny.METHODS[method] | {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 20}
        trainer = tiny.trained(tmp_path / name, model, **options)
        shipped = load_evaluation_model(tmp_path / name / "checkpoint-20")
        with trainer.evaluation_weights():
            evaluated = tiny.parameters(trainer.model)
        assert {n: p.dtype for n, p in shipped.named_parameters()} == {n: p.dtype for n, p in evaluated.items()}
        assert tiny.same(tiny.parameters(shipped), evaluated)
        as_told = load_evaluation_model(tmp_path / name / "checkpoint-20", torch_dtype=torch.bfloat16)
        assert {p.dtype for p in as_told.parameters()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run with checkpoints after 10 and 20 steps, its model saved; and the loss it reported at the end."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = tiny.trained(folder, **tiny.METHODS["ewa"], save_strategy="steps", save_steps=10)
    trainer.save_model()
    return folder, trainer.evaluate()["eval_loss"]


@pytest.fixture
def run(tmp_path, finished_run):
    """A copy of that run, to be changed."""
    return shutil.copytree(finished_run[0], tmp_path / "run")


def test_an_unfinished_checkpoint_is_never_taken_for_the_training_weights(run):
    (run / "model.safetensors").unlink()
    for lost in ("hf_radam.json", "trainer_state.json"):
        (run / "checkpoint-20" / lost).unlink()
        with pytest.raises(CheckpointError, match="has ewa/ but no hf_radam.json"):
            load_evaluation_model(run / "checkpoint-20")
        assert newest_loadable_checkpoint(run).name == "checkpoint-10"
    (run / "checkpoint-10" / "hf_radam.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_evaluation_model(run / "checkpoint-10")
    with pytest.raises(FileNotFoundError, match="neither a model"):
        load_evaluation_model(run)


def test_a_checkpoint_without_its_optimizer_and_a_run_with_an_average_elsewhere_still_ship(run, finished_run):
    shutil.copytree(run / "checkpoint-20" / "ewa", run / "ewa")
    for name in ("optimizer.pt", "scheduler.pt"):
        (run / "checkpoint-20" / name).unlink()
    (run / "checkpoint-20").rename(run / "final")  # under another name, too
    for folder in (run / "final", run):
        assert tiny.loss_of(load_evaluation_model(folder)) == pytest.approx(finished_run[1], abs=CLOSE)


def test_a_model_older_than_a_checkpoint_is_logged_and_an_incomplete_one_is_one_sentence(run, caplog):
    later = (run / "config.json").stat().st_mtime + 10
    for time in (later - 20, later):
        os.utime(run / "checkpoint-20" / "trainer_state.json", (time, time))
        load_evaluation_model(run)
        assert ("which is older than its checkpoint-20" in caplog.text) == (time == later)
    os.truncate(run / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=f"The weights in {run} are incomplete: .* Save them again"):
        load_evaluation_model(run)


def test_settings_are_edited_in_a_copy_of_the_weights(run):
    settings = run / "checkpoint-20" / "ewa" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_new_tokens": 7}))
    shutil.copytree(settings.parent, run / "copy")
    assert load_evaluation_model(run / "copy").generation_config.max_new_tokens == 7
    with pytest.raises(CheckpointError, match="ewa/generation_config.json is .* bytes long, not"):
        load_evaluation_model(run / "checkpoint-20")


def test_manifest_lists_every_file_with_its_hash(finished_run):
    checkpoint = finished_run[0] / "checkpoint-10"
    manifest = json.loads((checkpoint / "hf_radam.json").read_text())
    files = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"hf_radam.json"}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "ewa/model.safetensors"} <= files
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert manifest["format_version"] == 2 and manifest["method"]["ewa"] is True
    assert manifest["averaging"]["num_averaged"] == manifest["averaging"]["last_step"] == 10
    assert json.loads((checkpoint / "ewa" / "config.json").read_text())["dtype"] == "float32"


def test_a_checkpoint_never_holds_the_evaluation_weights_at_its_root(tmp_path):
    class Enter(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                trainer.stack.enter_context(trainer.evaluation_weights())

    trainer = tiny.trainer(tmp_path, **tiny.METHODS["schedule_free"], save_strategy="steps", save_steps=5)
    trainer.add_callback(Enter())
    with ExitStack() as trainer.stack:
        with pytest.raises(RuntimeError, match=r"holds the evaluation weights here .* Save the checkpoint outside"):
            trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    before = (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="would overwrite the training weights of that checkpoint"):
        trainer.save_model(str(tmp_path / "checkpoint-5"))
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() == before


def test_weights_that_the_class_does_not_save_stay_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.LlamaForCausalLM, "_keys_to_ignore_on_save", ["lm_head.weight"], raising=False)
    model = tiny.llama()
    model.lm_head.requires_grad_(False)
    options = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
    trainer = tiny.trained(tmp_path, model, **tiny.METHODS["ewa"], **options, load_best_model_at_end=True)
    assert torch.equal(model.lm_head.weight, tiny.llama().lm_head.weight)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=CLOSE)


def test_evaluation_weights_that_a_later_stock_run_left_behind_are_not_loaded(run):
    """Stock `Trainer` overwrites the files that it has, and leaves the others."""
    stock = tiny.stock_arguments(run, save_strategy="steps", save_steps=10)
    Trainer(tiny.llama(), stock, train_dataset=tiny.TRAIN).train()
    with pytest.raises(CheckpointError, match="checkpoint-20 was overwritten by a run that does not use hf_radam"):
        load_evaluation_model(run / "checkpoint-20")


def test_the_trainer_refuses_stock_arguments(tmp_path):
    message = "RAdamTrainer has arguments of class TrainingArguments. Make them with RAdamTrainingA"
    with pytest.raises(TypeError, match=message):
        RAdamTrainer(tiny.llama(), tiny.stock_arguments(tmp_path))
