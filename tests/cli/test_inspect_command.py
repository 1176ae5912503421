"""`hf-radam inspect`: what it says of checkpoints and runs, without torch.

Oracles: the arguments of the runs, and the functions with which resuming, extending and evaluating choose a checkpoint.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from inspecting import flip, inspect, snapshot
from tiny import METHODS, arguments, trained

from hf_radam import cli, load_evaluation_model
from hf_radam.checkpoints.extend import plan_resume
from hf_radam.checkpoints.load import newest_loadable_checkpoint
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest, write_manifest
from hf_radam.checkpoints.runs import check_resumable, newest_checkpoint
from hf_radam.cli.inspect import inspect_checkpoint, inspect_run

ROOT = Path(__file__).parents[2]


def test_it_needs_neither_torch_nor_transformers_nor_a_second_of_cpu(made):
    code = (
        "import sys; from hf_radam.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call = [sys.executable, "-c", code, "inspect", str(made / "wsd"), "--verify"]
    done = subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_says_method_progress_and_weights(made, name, capsys):
    checkpoint = made / name / "checkpoint-12"
    facts = inspect_checkpoint(checkpoint)
    args = arguments(made / "unused", **METHODS[name])
    schedule = args.schedule(20)
    method = {"optim": args.optim.value, "lr_scheduler_type": args.lr_scheduler_type.value, "ewa": args.ewa}
    assert facts["method"] == method
    assert (facts["step"], facts["max_steps"], facts["phase"], facts["problems"]) == (12, 20, "stable", {})
    assert facts["learning_rate"] == 1e-2 * (1.0 if schedule is None else schedule.multiplier(12))
    folder = "ewa" if "ewa" in name else "schedule_free" if "schedule_free" in name else ""
    assert facts["evaluation_folder"] == folder
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and f"method {method['optim']}, {method['lr_scheduler_type']}, with" in text
    assert "progress 12 of 20 steps; phase: stable" in text
    assert f"--resume_from_checkpoint {checkpoint}, with the flags of the run" in text
    assert f'load_evaluation_model("{checkpoint}") loads {folder + "/" if folder else "the root"}' in text
    load_evaluation_model(checkpoint)


def test_phases(made):
    """WSD-S with a decay from step 6 to the budget of 10 steps, and another from step 16 to 20."""
    folders = {int(path.name[11:]): path for path in (made / "wsd_s").glob("**/checkpoint-*")}
    phases = {step: inspect_checkpoint(folder)["phase"] for step, folder in folders.items()}
    assert phases == {6: "stable", 10: "end of a decay", 12: "stable", 18: "decay", 20: "finished"}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_says_which_checkpoint_the_trainer_takes(made, name, tmp_path, capsys):
    facts = inspect_run(made / name)
    assert facts["resumes"] == str(newest_checkpoint(made / name, check_resumable).path)
    assert facts["evaluates"] == str(made / name)
    longer = arguments(tmp_path, max_steps=40, extend_from=str(made / name), **METHODS[name])
    assert facts["extends"] == str(plan_resume(longer, None).checkpoint)
    code, text = inspect(made / name, capsys)
    assert code == 0
    for checkpoint in made.glob(f"{name}/**/checkpoint-*"):
        step = checkpoint.name.removeprefix("checkpoint-")
        assert f"{checkpoint.relative_to(made / name)} {step} of 20" in text
    assert f"--resume_from_checkpoint true takes {facts['resumes']}" in text


def test_damaged_checkpoints_are_passed_over(run, capsys, caplog):
    folder = run("wsd_s")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    for name in ("checkpoint-20/optimizer.pt", "_budgets/checkpoint-20/model.safetensors"):
        os.truncate(folder / name, 100)
    flip(folder / "checkpoint-18/trainer_state.json")  # of the same size
    facts = inspect_run(folder)
    assert facts["damaged"] == ["checkpoint-20", "_budgets/checkpoint-20"]
    facts = inspect_run(folder, verify=True)
    assert facts["damaged"] == ["checkpoint-20", "_budgets/checkpoint-20", "checkpoint-18"]
    assert facts["resumes"] == str(newest_checkpoint(folder, check_resumable).path) == str(folder / "checkpoint-12")
    assert facts["evaluates"] == str(newest_loadable_checkpoint(folder)) == str(folder / "checkpoint-20")
    code, text = inspect(folder, capsys)
    assert code == 1 and "checkpoint-20 20 of 20 finished corrupted: optimizer.pt is 100 bytes long" in text


@pytest.mark.parametrize("name", ["model.safetensors", "ewa/model.safetensors", "trainer_state.json", "hf_radam.json"])
def test_each_damaged_file_is_named(run, name, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    flip(checkpoint / name)
    assert inspect(checkpoint, capsys)[0] == int(name == "hf_radam.json")  # without --verify only its own hash is read
    assert cli.main(["inspect", str(checkpoint), "--verify"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"resume no: it is corrupted ({name})" in text
    (checkpoint / name).unlink()
    code, text = inspect(checkpoint, capsys)
    assert code == 1 and f"extend no: it is corrupted ({name})" in text
    if name in ("hf_radam.json", "ewa/model.safetensors"):
        assert f"evaluate no: it is corrupted ({name})" in text
        with pytest.raises(CheckpointError):
            load_evaluation_model(checkpoint)
    else:
        load_evaluation_model(checkpoint)


def test_a_manifest_of_an_unexpected_form_is_damage(run, capsys):
    checkpoint = run("wsd") / "checkpoint-12"
    good = {k: v for k, v in read_manifest(checkpoint).items() if k not in ("files", "manifest_sha256")}
    for change in ({"schedule": {"total_steps": 20}}, {"schedule": []}, {"method": "wsd"}, {"schedule_step": "a"}):
        write_manifest(checkpoint, good | change)
        code, text = inspect(checkpoint, capsys)
        assert code == 1 and "hf_radam.json has an unexpected form" in text, change
    write_manifest(checkpoint, good)
    assert inspect(checkpoint, capsys)[0] == 0
    file = checkpoint / "hf_radam.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 99'), "utf-8")
    code, text = inspect(checkpoint, capsys)
    assert code == 1 and "has format 99" in text


def test_a_checkpoint_in_the_decay_says_what_to_extend_instead(run, capsys):
    folder = run("wsd")
    text = inspect(folder / "checkpoint-18", capsys)[1]
    assert f"extend no: it is in the decay. Extend the run instead: --extend_from {folder}" in text
    for place in ("checkpoint-12", "checkpoint-6", "_pre_decay"):
        shutil.rmtree(folder / place)
    assert inspect_run(folder)["extends"] is None


def test_an_interrupted_save_is_named_and_left_alone(run, capsys):
    folder = run("ewa")
    shutil.copytree(folder / "checkpoint-6", folder / "_staging/checkpoint-24")
    (folder / "_staging/replaced").mkdir()
    (folder / "checkpoint-20").rename(folder / "_staging/replaced/checkpoint-20")
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(folder)
    code, text = inspect(folder, capsys)
    assert code == 0 and snapshot(folder) == before
    assert "left over _staging/checkpoint-24, _staging/replaced/checkpoint-20: of an interrupted save; resuming" in text
    assert inspect_run(folder)["resumes"] == str(folder / "checkpoint-20")


def test_save_only_model(tmp_path, capsys):
    options = METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path, save_only_model=True, **options)
    code, text = inspect(tmp_path, capsys)
    assert code == 0 and "checkpoint-2 2 of 4 stable not resumable" in text
    assert "true takes nothing" in text and newest_checkpoint(tmp_path, check_resumable) is None
    assert "resume no: it has no optimizer.pt and scheduler.pt (save_only_model?)" in text
    assert f'load_evaluation_model("{tmp_path / "checkpoint-4"}") loads ewa/' in text


def test_a_stock_checkpoint_lists_what_is_there(made_by_stock, tmp_path, capsys):
    code, text = inspect(made_by_stock / "checkpoint-5", capsys)
    assert code == 0 and "checkpoint-5: a stock checkpoint, step 5 of ?, complete" in text
    assert "layout one process or DDP, written by 1 process" in text and "model.safetensors" in text
    assert "extend not known: a stock checkpoint does not record its schedule" in text
    copy = Path(shutil.copytree(made_by_stock / "checkpoint-5", tmp_path / "checkpoint-5"))
    (copy / "a\x1b[2Jb").write_text("x", encoding="utf-8")
    (copy / "trainer_state.json").unlink()
    code, text = inspect(copy, capsys)
    assert code == 1 and "trainer_state.json is missing or cannot be read" in text
    assert "a?[2Jb" in text and "\x1b" not in text


def test_json_and_paths(run, monkeypatch, capsys):
    folder = run("schedule_free_ewa")
    assert cli.main(["inspect", str(folder / "checkpoint-12"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["step"], len(facts["files"])) == ("checkpoint", 12, 15)
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["checkpoints"]) == [f"checkpoint-{n}" for n in (20, 18, 12, 6)]
    monkeypatch.chdir(folder / "checkpoint-12")
    assert f'load_evaluation_model("{folder}/checkpoint-12")' in inspect(".", capsys)[1]


def test_what_holds_no_checkpoint(run, tmp_path, capsys):
    folder = run("wsd")
    (folder / "checkpoint-25").mkdir()
    code, text = inspect(folder, capsys)
    assert code == 1 and "checkpoint-25 - - holds no checkpoint: the folder is empty" in text and "None" not in text
    (tmp_path / "notes.txt").write_text("no run", encoding="utf-8")
    for path in (folder / "checkpoint-25", tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit) as ended:
            inspect(path, capsys)
        output = capsys.readouterr()
        assert ended.value.code == 2 and output.out == ""
        assert output.err.splitlines()[-1].startswith(f"hf-radam inspect: error: {path} is ")
