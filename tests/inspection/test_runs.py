"""`hf-radam inspect` on the folder of a run, and on checkpoints that cannot be resumed.

Oracles: the functions with which resuming, extending and evaluating choose their checkpoint.
"""

import os
import re
import shutil
from pathlib import Path

import peft
import pytest
from inspecting import inspect, snapshot, truncate
from tiny import METHODS, arguments, llama, trainer

from hf_radam.checkpoints import storage
from hf_radam.checkpoints.extend import plan_resume
from hf_radam.checkpoints.load import newest_loadable_checkpoint
from hf_radam.checkpoints.manifest import read_manifest, write_manifest
from hf_radam.checkpoints.runs import check_resumable, newest_checkpoint
from hf_radam.inspection.run import inspect_run


def extension_of(folder, output, total, **options):
    return plan_resume(arguments(output, max_steps=total, extend_from=str(folder), **options), None).checkpoint


@pytest.mark.parametrize("name", METHODS)
def test_what_is_taken_from_a_run_is_what_the_trainer_takes(made, name, tmp_path, capsys):
    facts = inspect_run(made / name)
    assert [Path(e.name).name for e in facts.checkpoints][:2] == ["checkpoint-20"] * 2 or name != "wsd_s"
    assert facts.resumes == str(newest_checkpoint(made / name, check_resumable).path)
    assert facts.evaluates == str(made / name)
    decay = {"decay_steps": 8} if name == "wsd" else {}
    assert facts.extends == str(extension_of(made / name, tmp_path, 40, **METHODS[name] | decay))
    code, text = inspect(made / name, capsys)
    assert code == 0
    for checkpoint in made.glob(f"{name}/**/checkpoint-*"):
        assert f"{checkpoint.relative_to(made / name)} {checkpoint.name.removeprefix('checkpoint-')} of 20" in text
    assert f"--resume_from_checkpoint true takes {facts.resumes}" in text
    assert f"{facts.resumes}: a checkpoint of hf_radam" in text


def test_a_run_without_a_root_model_and_with_damaged_checkpoints(run, capsys, caplog):
    folder = run("wsd_s")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    truncate(folder / "checkpoint-20/optimizer.pt")
    truncate(folder / "_budgets/checkpoint-20/model.safetensors")
    truncate(folder / "checkpoint-18/trainer_state.json")
    facts = inspect_run(folder)
    assert facts.bad == ["checkpoint-20", "_budgets/checkpoint-20", "checkpoint-18"]
    assert facts.resumes == str(newest_checkpoint(folder, check_resumable).path) == str(folder / "checkpoint-12")
    assert facts.evaluates == str(newest_loadable_checkpoint(folder)) == str(folder / "checkpoint-20")
    code, text = inspect(folder, capsys)
    assert code == 1
    assert "checkpoint-20 20 of 20 finished damaged; optimizer.pt is" in text
    assert "checkpoint-18 18 of 20 in the decay damaged; trainer_state.json is" in text
    assert f"{folder / 'checkpoint-12'}: a checkpoint of hf_radam" in text


def test_a_decayed_checkpoint_says_what_to_extend_instead(run, tmp_path, capsys):
    folder = run("wsd")
    for step in (18, 20):
        text = inspect(folder / f"checkpoint-{step}", capsys)[1]
        assert f"--extend_from {folder} --max_steps N (N: the new total, above 20) goes on from" in text
        source = re.search(r"goes on from (\S+)", text)[1]
        assert Path(source) == extension_of(folder, tmp_path / "new", 30, **METHODS["wsd"])
    for place in ("checkpoint-12", "checkpoint-6", "_pre_decay"):
        shutil.rmtree(folder / place)
    assert "has no checkpoint from before the decay" in inspect(folder / "checkpoint-18", capsys)[1]
    assert inspect_run(folder).extends is None


def test_interrupted_and_extended_runs(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 6, **METHODS["wsd"]}
    run = trainer(tmp_path / "run", **options)
    stop = {"done": 0}

    def step(*args, original=run.training_step, **kwargs):
        stop["done"] += 1
        if stop["done"] > 14:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    run.training_step = step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    facts = inspect_run(tmp_path / "run")
    assert (facts.model, facts.bad) == (None, []) and facts.newest_whole.update == 12
    assert facts.evaluates == str(newest_loadable_checkpoint(tmp_path / "run"))
    text = inspect(tmp_path / "run", capsys)[1]
    assert f"--resume_from_checkpoint {tmp_path / 'run/checkpoint-12'}, with the flags the run was started" in text

    extended = trainer(tmp_path / "run", **options | {"extend_from": str(tmp_path / "run"), "max_steps": 30})
    extended.train()
    facts = inspect_run(tmp_path / "run")
    assert facts.newest_whole.max_steps == 30 and facts.newest_whole.phase == "finished"
    assert facts.extends == str(extension_of(tmp_path / "run", tmp_path / "new", 40, **METHODS["wsd"]))


def test_leftovers_are_told_and_left_alone(run, capsys):
    folder = run("ewa")
    staging = folder / "_staging"
    shutil.copytree(folder / "checkpoint-6", staging / "checkpoint-24")
    (staging / "checkpoint-24/hf_radam.json").unlink()
    (staging / "replaced").mkdir()
    (folder / "checkpoint-20").rename(staging / "replaced/checkpoint-20")
    before = snapshot(folder)
    code, text = inspect(folder, capsys)
    assert snapshot(folder) == before
    assert code == 0
    assert "_staging/checkpoint-24: a save that did not come to its end" in text
    assert "_staging/replaced/checkpoint-20: takes the place of checkpoint-20 when" in text
    resumes = inspect_run(folder).resumes
    storage.recover_interrupted_save(folder)
    assert resumes == str(newest_checkpoint(folder, check_resumable).path) == str(folder / "checkpoint-20")


def test_a_model_that_is_older_than_the_run(run, capsys):
    folder = run("ewa")
    assert "as save_model() wrote them resume" in inspect(folder, capsys)[1]
    for name in ("model.safetensors", "config.json"):
        os.utime(folder / name, (1, 1))
    assert "as save_model() wrote them, older than checkpoint-20 resume" in inspect(folder, capsys)[1]


def test_save_only_model(tmp_path, capsys):
    trainer(tmp_path, save_strategy="steps", save_steps=10, save_only_model=True, **METHODS["ewa"]).train()
    code, text = inspect(tmp_path, capsys)
    assert code == 0 and "checkpoint-10 10 of 20 stable not resumable" in text
    assert "true takes nothing" in text and newest_checkpoint(tmp_path, check_resumable) is None
    assert "resume no: without optimizer.pt and scheduler.pt (save_only_model?)" in text
    assert f'load_evaluation_model("{tmp_path / "checkpoint-20"}") loads ewa/' in text


def test_an_adapter_one_level_deeper(run, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    content = {k: v for k, v in read_manifest(checkpoint).items() if k not in ("files", "manifest_sha256")}
    (checkpoint / "ewa/adapter").mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (checkpoint / "ewa" / name).rename(checkpoint / "ewa/adapter" / name.replace("model.s", "adapter_model.s"))
    config = checkpoint / "ewa/adapter/adapter_config.json"
    config.write_text('{"base_model_name_or_path": "base"}', encoding="utf-8")
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    content["evaluation"]["folder"] = "ewa/adapter"
    write_manifest(checkpoint, content)
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and "ewa/: the averaged weights (float32), used for evaluation" in text
    assert f'load_evaluation_model("{checkpoint}") loads ewa/adapter/' in text
    config.write_text("{}", encoding="utf-8")
    write_manifest(checkpoint, content)
    assert "the adapter does not say what its base is" in inspect(checkpoint, capsys)[1]


def test_a_run_of_an_adapter(tmp_path, capsys):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    lora = trainer(tmp_path, model, save_strategy="steps", save_steps=10, **METHODS["ewa"])
    lora.train()
    lora.save_model()
    code, text = inspect(tmp_path, capsys)
    assert code == 0 and "checkpoint-20 20 of 20 finished whole" in text
