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
from transformers import AutoModelForCausalLM

from hf_radam import RAdamTrainer, load_evaluation_model
from hf_radam.checkpoints.load import newest_loadable_checkpoint
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest

# The mean of 16 fp32 losses in other batches: a few roundings of 6e-8 on values of size 4.
CLOSE = 2e-6


def folder_of(options: dict) -> str | None:
    if options.get("ewa"):
        return "ewa"
    return "schedule_free" if options.get("optim") == "radam_schedulefree" else None


@pytest.mark.parametrize("method", tiny.METHODS)
def test_evaluate_is_what_ships(tmp_path, method):
    options = tiny.METHODS[method]
    trainer = tiny.trained(
        tmp_path, **options, save_strategy="steps", save_steps=15, eval_strategy="steps", eval_steps=5
    )
    reported = [
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == 15
    ]
    checkpoint = tmp_path / "checkpoint-15"
    assert tiny.loss_of(load_evaluation_model(checkpoint)) == pytest.approx(reported[0], abs=CLOSE)
    folder = checkpoint / (folder_of(options) or ".")
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(folder)) == pytest.approx(reported[0], abs=CLOSE)
    assert read_manifest(checkpoint)["evaluation"]["folder"] == folder_of(options)
    assert (checkpoint / "ewa").is_dir() == ("ewa" in options)
    assert (checkpoint / "schedule_free").is_dir() == (options["optim"] == "radam_schedulefree")
    # save_model(), the folder of the run, and predict()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(loss, abs=CLOSE)
    assert tiny.loss_of(load_evaluation_model(tmp_path)) == pytest.approx(loss, abs=CLOSE)
    assert trainer.predict(tiny.EVAL).metrics["test_loss"] == pytest.approx(loss, abs=CLOSE)
    with trainer.evaluation_weights():
        assert tiny.loss_of(trainer.model) == pytest.approx(loss, abs=CLOSE)
    # ... which are not the training weights, that the checkpoint's root holds
    if folder_of(options):
        raw = tiny.loss_of(AutoModelForCausalLM.from_pretrained(checkpoint))
        assert abs(raw - reported[0]) > 100 * CLOSE


KINDS = [("ewa", build) for build in (tiny.mixtral, tiny.tied, tiny.bf16, tiny.partly_frozen)] + [
    ("schedule_free", build)
    for build in (tiny.mixtral, tiny.tied, tiny.partly_frozen)  # bf16 parameters are refused
]


@pytest.mark.parametrize(("method", "build"), KINDS)
def test_other_kinds_of_model(tmp_path, method, build):
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
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20" / folder_of(options))
    assert plain.dtype == torch.float32  # also for a bf16 model: the average is kept in fp32
    assert tiny.loss_of(plain) == pytest.approx(loss, abs=close)
    if build is tiny.tied:
        assert shipped.lm_head.weight is shipped.model.embed_tokens.weight
    if build is tiny.partly_frozen:
        assert torch.equal(shipped.model.embed_tokens.weight, trainer.model.model.embed_tokens.weight)


@pytest.mark.parametrize("method", ["ewa", "schedule_free_ewa"])
def test_raw_weights_are_evaluated_beside_the_average(tmp_path, method):
    """Of a schedule-free run they are y."""
    trainer = tiny.trained(tmp_path, **tiny.METHODS[method], ewa_eval_raw=True)
    metrics = trainer.evaluate()
    assert tiny.loss_of(trainer.model) == pytest.approx(metrics["eval_raw_loss"], abs=CLOSE)
    assert metrics["eval_raw_loss"] != metrics["eval_loss"]
    assert "test_raw_loss" not in trainer.predict(tiny.EVAL).metrics
    both = trainer.evaluate({"a": tiny.EVAL, "b": tiny.EVAL[:4]})
    assert both["eval_a_raw_loss"] == pytest.approx(metrics["eval_raw_loss"], abs=CLOSE)
    assert {"eval_a_loss", "eval_b_loss", "eval_b_raw_loss"} <= set(both) and "eval_raw_loss" not in both


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


@pytest.mark.parametrize("method", ["ewa", "schedule_free", "wsd"])
def test_the_best_model_is_the_best_evaluation_weights(tmp_path, method):
    options = tiny.METHODS[method] | {"learning_rate": 4e-2, "max_steps": 24, "load_best_model_at_end": True}
    saving = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = tiny.trainer(tmp_path, **options, **saving)
    trainer.train_dataset = tiny.TRAIN[:4]  # soon known by heart, so that the best evaluation is not the last
    trainer.train()
    best = trainer.state.best_metric
    reported = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best == min(reported) < reported[-1] - 1e-3
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=CLOSE)
    assert tiny.loss_of(trainer.model) == pytest.approx(best, abs=CLOSE)
    trainer.save_model()
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(best, abs=CLOSE)
    with pytest.raises(RuntimeError, match="holds the best evaluation weights"):
        trainer.train()


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


@pytest.mark.parametrize("lost", ["hf_radam.json", "trainer_state.json"])
def test_an_unfinished_checkpoint_is_never_taken_for_the_training_weights(run, lost):
    (run / "model.safetensors").unlink()
    for name in {"hf_radam.json", lost}:
        (run / "checkpoint-20" / name).unlink()
    with pytest.raises(CheckpointError, match="has ewa/ but no hf_radam.json"):
        load_evaluation_model(run / "checkpoint-20")
    assert newest_loadable_checkpoint(run).name == "checkpoint-10"
    (run / "checkpoint-10" / "hf_radam.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_evaluation_model(run / "checkpoint-10")
    with pytest.raises(FileNotFoundError, match="neither a model"):
        load_evaluation_model(run)


def test_a_checkpoint_kept_without_its_optimizer_still_ships(run, finished_run):
    for name in ("optimizer.pt", "scheduler.pt"):
        (run / "checkpoint-20" / name).unlink()
    shipped = run / "final"  # under another name, too
    (run / "checkpoint-20").rename(shipped)
    assert tiny.loss_of(load_evaluation_model(shipped)) == pytest.approx(finished_run[1], abs=CLOSE)


def test_an_incomplete_model_is_one_sentence(run):
    os.truncate(run / "model.safetensors", 5000)
    load_evaluation_model(run)  # its newest checkpoint
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=f"The weights in {run} are incomplete: .* Save them again"):
        load_evaluation_model(run)


def test_a_root_older_than_a_checkpoint_is_logged(run, caplog):
    later = (run / "config.json").stat().st_mtime + 10
    os.utime(run / "checkpoint-20" / "trainer_state.json", (later - 20, later - 20))
    load_evaluation_model(run)
    assert "older than" not in caplog.text
    os.utime(run / "checkpoint-20" / "trainer_state.json", (later, later))
    load_evaluation_model(run)
    assert "which is older than its checkpoint-20" in caplog.text


def test_a_run_that_keeps_its_average_elsewhere_is_no_checkpoint(run, finished_run):
    shutil.copytree(run / "checkpoint-20" / "ewa", run / "ewa")
    assert tiny.loss_of(load_evaluation_model(run)) == pytest.approx(finished_run[1], abs=CLOSE)


def test_settings_are_edited_in_a_copy_of_the_weights(run):
    shutil.copytree(run / "checkpoint-20" / "ewa", run / "copy")
    for folder in (run / "copy", run / "checkpoint-20" / "ewa"):
        settings = folder / "generation_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_new_tokens": 7}))
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


def test_a_checkpoints_root_is_not_overwritten_with_evaluation_weights(tmp_path):
    trainer = tiny.trained(tmp_path, **tiny.METHODS["schedule_free"], save_strategy="steps", save_steps=20)
    with pytest.raises(ValueError, match="would overwrite the training weights of that checkpoint"):
        trainer.save_model(str(tmp_path / "checkpoint-20"))
    root = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    assert tiny.same(tiny.parameters(root), tiny.parameters(trainer.model))


def test_no_checkpoint_is_saved_while_the_model_holds_the_evaluation_weights(tmp_path):
    class Enter(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.stack.enter_context(trainer.evaluation_weights())

    trainer = tiny.trainer(tmp_path, **tiny.METHODS["schedule_free"], save_strategy="steps", save_steps=5)
    trainer.add_callback(Enter())
    with ExitStack() as trainer.stack:
        with pytest.raises(RuntimeError, match=r"holds the evaluation weights here .* Save the checkpoint outside"):
            trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_weights_that_the_class_does_not_save_stay_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.LlamaForCausalLM, "_keys_to_ignore_on_save", ["lm_head.weight"], raising=False)
    model = tiny.llama()
    model.lm_head.requires_grad_(False)
    options = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
    trainer = tiny.trained(tmp_path, model, **tiny.METHODS["ewa"], **options, load_best_model_at_end=True)
    assert torch.equal(model.lm_head.weight, tiny.llama().lm_head.weight)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=CLOSE)


def test_evaluation_weights_that_a_later_stock_run_left_behind_are_not_loaded(run):
    """A run without our flags, or of stock `Trainer`, overwrites the files that it has, and leaves the others."""
    tiny.trainer(run, tiny.llama(), save_strategy="steps", save_steps=10).train()
    with pytest.raises(CheckpointError, match="checkpoint-20 was overwritten by a run that does not use hf_radam"):
        load_evaluation_model(run / "checkpoint-20")


def test_the_trainer_refuses_stock_arguments(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(
        TypeError, match="RAdamTrainer has arguments of class TrainingArguments. Make them with RAdamTrainingA"
    ):
        RAdamTrainer(tiny.llama(), TrainingArguments(output_dir=str(tmp_path), report_to="none"))
