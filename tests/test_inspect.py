"""`hf-radam inspect` on real checkpoints: what it says is compared with the run, the weights and what resuming does.

Oracles: the arguments of the run, the tensors in memory when it was saved (x or y), the functions that resuming,
extending and evaluating choose their checkpoint with, and for damage the damage that was done.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import EVAL, METHODS, TRAIN, arguments, llama, trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_radam import cli, load_evaluation_model, storage
from hf_radam.checkpoint import read_parameters
from hf_radam.extension import extend
from hf_radam.inspection import inspect_checkpoint
from hf_radam.integrity import damage
from hf_radam.loading import newest_checkpoint
from hf_radam.manifest import read_manifest, write_manifest
from hf_radam.phases import phase
from hf_radam.pickled import Opaque, pickled_attributes
from hf_radam.run_inspection import inspect_run
from hf_radam.runs import check_resumable, newest
from hf_radam.schedules import wsd, wsd_s
from hf_radam.uses import uses

ROOT = Path(__file__).parents[1]


def stock(folder, model=None, **overrides):
    options = {"max_steps": 10, "save_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), **options | overrides)
    return Trainer(model or llama(), args, train_dataset=TRAIN, eval_dataset=EVAL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of each method, with checkpoints every 6 of 20 updates and the model at its root."""
    root = tmp_path_factory.mktemp("made")
    for name, options in METHODS.items():
        run = trainer(root / name, save_strategy="steps", save_steps=6, **options)
        run.train()
        run.save_model()
    return root


@pytest.fixture(scope="module")
def made_by_stock(tmp_path_factory):
    """A run of stock `Trainer` with AdamW, which it decays linearly."""
    root = tmp_path_factory.mktemp("stock")
    stock(root, warmup_steps=0.6).train()
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of a finished run: `run("wsd")`."""

    def copy(name):
        return Path(shutil.copytree(made / name, tmp_path / name))

    return copy


def snapshot(folder):
    """Every entry below a folder with its bytes, mode and time of change."""
    entries = {}
    for path in [folder, *folder.rglob("*")]:
        facts = path.stat()
        entries[path] = (facts.st_mode, facts.st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return entries


def inspect(path, capsys):
    """Exit code and output of the command, with runs of white space as one blank."""
    code = cli.main(["inspect", str(path)])
    return code, " ".join(capsys.readouterr().out.split())


# ---- Where it stands ----


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_named_with_its_place_and_its_learning_rate(made, name, capsys):
    facts = inspect_checkpoint(made / name / "checkpoint-12")
    args = trainer(made / "unused", **METHODS[name]).args
    assert (facts.state, facts.checked, facts.update, facts.max_steps) == ("whole", "checksums", 12, 20)
    assert (facts.optim, facts.lr_scheduler_type) == (args.optim.value, args.lr_scheduler_type.value)
    assert facts.ewa == args.ewa
    schedule = args.schedule(20)
    assert facts.learning_rates == [1e-2 * (1.0 if schedule is None else schedule(12))]
    assert facts.phase == "stable"
    assert facts.root == ("y" if "schedule_free" in name else "training weights")
    assert facts.evaluation_folder == ("ewa" if "ewa" in name else "schedule_free" if "schedule_free" in name else "")
    code, text = inspect(facts.path, capsys)
    assert code == 0 and "update 12 of 20" in text and f"method {facts.optim}, {facts.lr_scheduler_type}" in text
    for folder in facts.beside:
        assert f"{folder}/: " in text
    if name == "schedule_free_ewa":
        assert facts.beside == ["ewa", "schedule_free"] and "ewa/: the averaged weights (float32), used for" in text
        assert "fixed window, decay 0.9 per update, every 3 updates after update 0; 4 averagings, the last" in text
        optimizer = torch.load(Path(facts.path, "optimizer.pt"), weights_only=True)["param_groups"][0]
        assert facts.schedule_free == {"train_mode": True, "weight_sum": optimizer["weight_sum"], "k": 12}
    if name == "ewa":
        assert "growing window, half-life 0.0625 of the updates since averaging began" in text


def test_learning_rate_of_a_checkpoint_without_its_schedule_file(run):
    checkpoint = run("wsd") / "checkpoint-18"
    (checkpoint / "scheduler.pt").unlink()
    assert inspect_checkpoint(checkpoint).learning_rates == [1e-2 * wsd(18, total_steps=20, decay_steps=8)]


WSD = {"warmup_steps": 3, "decay_type": "linear", "min_lr_ratio": 0.0, "total_steps": 20, "decay_steps": 8}
WSD_S = {**WSD, "budgets": [10, 20], "decay_steps": [4, 8]}
del WSD_S["total_steps"]


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        (WSD, {0: "warm-up", 2: "warm-up", 3: "stable", 11: "stable", 12: "stable", 13: "decay", 19: "decay"}),
        (WSD_S, {2: "warm-up", 3: "stable", 6: "stable", 7: "decay", 9: "decay", 10: "budget", 11: "stable"}),
        (WSD_S, {12: "stable", 13: "decay", 19: "decay", 20: "finished"}),
    ],
)
def test_phases_change_where_the_multiplier_does(schedule, phases):
    def rate(step):
        return wsd_s(step, **schedule) if "budgets" in schedule else wsd(step, **schedule)

    for step, expected in phases.items():
        assert phase("wsd", schedule, step, finished=False) == expected, step
        # A rate below the peak for the next update is what a ramp or a decay that has begun means.
        below = rate(step) < 1 and step not in (schedule.get("budgets") or ())
        assert below == (expected in ("warm-up", "decay")), step
    assert phase("wsd", schedule, 19, finished=True) == "finished"


@pytest.mark.parametrize(
    ("name", "step", "warmup", "expected"),
    [
        *[("linear", 3, 4, "warm-up"), ("linear", 4, 4, "decay"), ("cosine", 0, 0, "decay")],
        *[("constant", 3, 4, "stable"), ("constant_with_warmup", 3, 4, "warm-up")],
        *[("constant_with_warmup", 4, 4, "stable"), ("warmup_stable_decay", 9, 4, None), ("linear", 4, None, None)],
    ],
)
def test_phases_of_upstreams_schedules(name, step, warmup, expected):
    assert phase(name, None, step, finished=False, warmup_steps=warmup) == expected


# ---- Stock Trainer ----


def test_a_stock_checkpoint_is_told_from_its_files(made_by_stock, capsys):
    code, text = inspect(made_by_stock / "checkpoint-5", capsys)
    assert code == 0
    assert "a checkpoint of stock Trainer, whole as far as the form of its files tells" in text
    assert "method adamw_torch, linear, no ewa" in text or "method adamw_torch_fused, linear, no ewa" in text
    rate = torch.load(made_by_stock / "checkpoint-5/scheduler.pt", weights_only=True)["_last_lr"][0]
    assert f"update 5 of 10, in the warm-up; learning rate of the next update {rate:g} " in text
    assert "root training weights" in text and "files (without checksums to compare with" in text
    assert "extend no: linear" in text


class Iterates(TrainerCallback):
    """Computes x and y after every update from their definition: x is the weighted mean of all z, y lies before z."""

    def __init__(self):
        self.sums, self.weight, self.at = {}, 0.0, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        group = optimizer.param_groups[0]
        weight, self.weight = group["weight_sum"] - self.weight, group["weight_sum"]
        x, y = {}, {}
        for name, parameter in model.named_parameters():
            z = optimizer.state[parameter]["z"].double()
            self.sums[name] = self.sums.get(name, 0) + weight * z
            x[name] = self.sums[name] / self.weight if self.weight else z
            y[name] = group["betas"][0] * x[name] + (1 - group["betas"][0]) * z
        self.at[state.global_step] = {"x": x, "y": y}


def distance(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in b)


@pytest.mark.parametrize(
    ("evaluations", "step", "expected"), [(None, 8, "y"), (None, 16, "y"), (8, 8, "x"), (5, 8, "y"), (5, 16, "x")]
)
def test_x_or_y_is_what_the_stock_file_holds(tmp_path, evaluations, step, expected, capsys):
    options = {"eval_strategy": "steps", "eval_steps": evaluations} if evaluations else {}
    options |= {"max_steps": 16, "save_steps": 8, "optim": "schedule_free_radam", "lr_scheduler_type": "constant"}
    model, truth = llama(), Iterates()
    upstream = stock(tmp_path, model, **options)
    upstream.add_callback(truth)
    upstream.train()
    checkpoint, other = tmp_path / f"checkpoint-{step}", "x" if expected == "y" else "y"
    saved = read_parameters(model, checkpoint)
    near = 1e-6  # float32 rounds weights of about 0.1 over 16 updates; x and y are 20 times as far apart, and more
    assert distance(saved, truth.at[step][expected]) < near < 0.05 * distance(saved, truth.at[step][other])

    facts = inspect_checkpoint(checkpoint)
    assert facts.root == expected and facts.schedule_free["k"] == step
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and f"root {expected}, the " in text
    assert ("stock Trainer saves y unless it evaluated in the same step" in text) == (expected == "y")
    assert (f'load_evaluation_model("{checkpoint}") loads {expected}') in text

    # "RAdamTrainer, resumed from it, evaluates and saves x"
    ours = trainer(tmp_path, optim="radam_schedulefree", max_steps=step, weight_decay=0.0, adam_beta2=0.999)
    ours.train(resume_from_checkpoint=str(checkpoint))
    ours.save_model(tmp_path / "x")
    assert distance(read_parameters(model, tmp_path / "x"), truth.at[step]["x"]) < near


def test_x_and_y_before_the_first_weight(tmp_path, capsys):
    stock(tmp_path, optim="schedule_free_radam", lr_scheduler_type="constant", max_steps=2).train()
    assert "weight_sum 0: x and y are the same still" in inspect(tmp_path / "checkpoint-2", capsys)[1]


def test_the_arguments_are_read_without_unpickling(made, made_by_stock):
    for file in (made / "ewa/checkpoint-6/training_args.bin", made_by_stock / "checkpoint-5/training_args.bin"):
        found, loaded = pickled_attributes(file), vars(torch.load(file, weights_only=False))
        assert found.keys() == loaded.keys()
        plain = {name: value for name, value in found.items() if not isinstance(value, Opaque)}
        plain.pop("_setup_devices")  # torch.device("cpu"), a class applied to one string
        assert len(plain) > 80
        assert plain == {name: getattr(loaded[name], "value", loaded[name]) for name in plain}


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"])
def test_nothing_in_the_files_is_run(run, name, tmp_path, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    torch.save(Trap(tmp_path / "trapped"), checkpoint / name)
    (checkpoint / "hf_radam.json").unlink()  # so that all of them are looked into
    assert inspect(checkpoint, capsys)[0] == 1
    assert not (tmp_path / "trapped").exists()
    with pytest.raises(FileExistsError):  # the trap works
        (tmp_path / "trapped").mkdir()
        pickle.loads(pickle.dumps(Trap(tmp_path / "trapped")))


# ---- Damage ----


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def a_list(file):
    file.write_text("[1, {}]", encoding="utf-8")


def nested(file):
    file.write_text("[" * 100_000, encoding="utf-8")


OURS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "hf_radam.json"]
OURS += ["training_args.bin", "config.json", "schedule_free/model.safetensors", "schedule_free/config.json"]


@pytest.mark.parametrize("harm", [truncate, flip, a_list, nested, Path.unlink])
@pytest.mark.parametrize("name", OURS)
def test_each_damaged_file_is_named_and_the_rest_is_told(run, name, harm, capsys):
    checkpoint = run("schedule_free") / "checkpoint-12"
    harm(checkpoint / name)
    facts = inspect_checkpoint(checkpoint)
    assert facts.state == "damaged" and name in facts.problems
    assert {file.name for file in facts.files if file.problem} == set(facts.problems)
    assert name == "hf_radam.json" or list(facts.problems) == [name]
    assert (facts.update, facts.max_steps, facts.optim, facts.root) == (12, 20, "radam_schedulefree", "y")
    code, text = inspect(checkpoint, capsys)
    assert code == 1 and f"resume no: damaged ({name}" in text and f"{name} BAD: " in text
    can = uses(facts)["evaluate"]
    harmless = not name.startswith("schedule_free/") and name != "hf_radam.json"
    assert can.possible == harmless, can
    if harmless:
        load_evaluation_model(checkpoint)


@pytest.mark.parametrize("harm", [truncate, a_list, nested, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_stock_checkpoint(made_by_stock, tmp_path, name, harm, capsys):
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(made_by_stock / "checkpoint-5", checkpoint)
    harm(checkpoint / name)
    code, text = inspect(checkpoint, capsys)
    if (name, harm) == ("optimizer.pt", Path.unlink):  # without a manifest nobody knows that there was one
        assert code == 0 and "resume no: without optimizer.pt (save_only_model?)" in text
    else:
        assert code == 1 and f"{name} BAD: " in text
    assert "method adamw_torch" in text


def test_strange_manifests_with_a_right_checksum_are_told(run, capsys):
    checkpoint = run("wsd") / "checkpoint-12"
    good = {k: v for k, v in read_manifest(checkpoint).items() if k not in ("files", "manifest_sha256")}
    strange = [{"schedule": {"total_steps": 20}}, {"schedule": []}, {"max_steps": float("inf")}, {"method": "wsd"}]
    strange += [{"averaging": 3}, {"evaluation": {"folder": 3}}, {"global_step": None}, {"schedule_step": -1}]
    for change in strange:
        write_manifest(checkpoint, good | change)
        code, text = inspect(checkpoint, capsys)
        assert code == 1 and "has not the form of a manifest" in text and "update 12 of 20" in text, change
    write_manifest(checkpoint, good)
    assert inspect(checkpoint, capsys)[0] == 0


def test_a_manifest_of_another_format_is_not_called_damaged(run, capsys):
    checkpoint = run("wsd") / "checkpoint-12"
    file = checkpoint / "hf_radam.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 99'), "utf-8")
    code, text = inspect(checkpoint, capsys)
    assert code == 1 and "has format 99" in text and "another format" in text and "damaged" not in text


def test_random_damage_never_ends_in_a_traceback(run, made_by_stock, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    ours = run("schedule_free_ewa") / "checkpoint-12"
    theirs = Path(shutil.copytree(made_by_stock / "checkpoint-5", tmp_path / "checkpoint-5"))
    for round_ in range(60):
        checkpoint = (ours, theirs)[round_ % 2]
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        file = files[round_ // 2 % len(files)]
        content = file.read_bytes()
        place, length = (int(torch.randint(len(content), (), generator=generator)) for _ in range(2))
        file.write_bytes(content[:place] + bytes(min(length, 512)) + content[place + length % 600 :])
        code, text = inspect(checkpoint, capsys)
        assert code == int(bool(damage(checkpoint))) and text, (round_, file)
        file.write_bytes(content)


# ---- Runs ----


def extension_of(folder, output, total, **options):
    return extend(arguments(output, max_steps=total, extend_from=str(folder), **options)).checkpoint


@pytest.mark.parametrize("name", METHODS)
def test_what_is_taken_from_a_run_is_what_the_trainer_takes(made, name, tmp_path, capsys):
    facts = inspect_run(made / name)
    assert [Path(e.name).name for e in facts.checkpoints][:2] == ["checkpoint-20"] * 2 or name != "wsd_s"
    assert facts.resumes == str(newest(made / name, check_resumable).path)
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
    assert facts.resumes == str(newest(folder, check_resumable).path) == str(folder / "checkpoint-12")
    assert facts.evaluates == str(newest_checkpoint(folder)) == str(folder / "checkpoint-20")
    code, text = inspect(folder, capsys)
    assert code == 1
    assert "checkpoint-20 20 of 20 finished damaged; optimizer.pt is" in text
    assert "checkpoint-18 18 of 20 in the decay damaged; trainer_state.json is" in text
    assert f"{folder / 'checkpoint-12'}: a checkpoint of hf_radam" in text


def test_a_damaged_model_at_the_root(run, capsys):
    folder = run("wsd")
    truncate(folder / "model.safetensors")
    code, text = inspect(folder, capsys)
    assert code == 1 and "damaged: the model at the root" in text and "model.safetensors cannot be read" in text


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
    assert facts.evaluates == str(newest_checkpoint(tmp_path / "run"))
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
    storage.recover(folder)
    assert resumes == str(newest(folder, check_resumable).path) == str(folder / "checkpoint-20")


def test_a_model_that_is_older_than_the_run(run, capsys):
    folder = run("ewa")
    assert "as save_model() wrote them resume" in inspect(folder, capsys)[1]
    for name in ("model.safetensors", "config.json"):
        os.utime(folder / name, (1, 1))
    assert "as save_model() wrote them, older than checkpoint-20 resume" in inspect(folder, capsys)[1]


# ---- What cannot be resumed ----


def test_save_only_model(tmp_path, capsys):
    trainer(tmp_path, save_strategy="steps", save_steps=10, save_only_model=True, **METHODS["wsd"]).train()
    code, text = inspect(tmp_path, capsys)
    assert code == 0 and "checkpoint-10 10 of 20 stable not resumable" in text
    assert "true takes nothing" in text and newest(tmp_path, check_resumable) is None
    assert "resume no: without optimizer.pt and scheduler.pt (save_only_model?)" in text
    assert f'load_evaluation_model("{tmp_path / "checkpoint-20"}") loads the root' in text


def test_sharded_optimizers_are_not_called_damaged(made_by_stock, tmp_path, capsys):
    checkpoint = Path(shutil.copytree(made_by_stock / "checkpoint-5", tmp_path / "checkpoint-5"))
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and "saved with DeepSpeed or FSDP (pytorch_model_fsdp_0)" in text


def test_an_adapter_one_level_deeper(run, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    content = {k: v for k, v in read_manifest(checkpoint).items() if k not in ("files", "manifest_sha256")}
    (checkpoint / "ewa/adapter").mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (checkpoint / "ewa" / name).rename(checkpoint / "ewa/adapter" / name.replace("model.s", "adapter_model.s"))
    (checkpoint / "ewa/adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    content["evaluation"]["folder"] = "ewa/adapter"
    write_manifest(checkpoint, content)
    code, text = inspect(checkpoint, capsys)
    assert code == 0 and "ewa/: the averaged weights (float32), used for evaluation" in text
    assert f'peft.AutoPeftModelForCausalLM.from_pretrained("{checkpoint / "ewa/adapter"}")' in text


# ---- The command ----


def test_the_command_itself(run, tmp_path):
    folder = run("wsd")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}

    def command(*words):
        call = [sys.executable, "-W", "error", "-m", "hf_radam.cli", "inspect", *words]
        return subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    flip(folder / "checkpoint-18/model.safetensors")
    done = command("wsd")
    assert (done.returncode, done.stderr) == (1, "")
    assert "damaged: checkpoint-18\n" in done.stdout
    assert "damaged; model.safetensors has another sha256 than when it was written" in done.stdout
    done = command("nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("hf-radam inspect: error: nowhere is no folder: give a checkpoint")


def test_a_path_that_is_neither(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no run", encoding="utf-8")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["inspect", str(path)])
        output = capsys.readouterr()
        assert ended.value.code == 2 and output.out == ""
        assert output.err.splitlines()[-1].startswith(f"hf-radam inspect: error: {path} is ")


def test_an_empty_folder_with_the_name_of_a_checkpoint_is_a_damaged_one(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    assert inspect(tmp_path / "checkpoint-5", capsys)[0] == 1


def test_json_has_the_facts(run, capsys):
    folder = run("schedule_free_ewa")
    assert cli.main(["inspect", str(folder / "checkpoint-12"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["update"], facts["phase"], facts["root"]) == ("checkpoint", 12, "stable", "y")
    assert facts["uses"]["evaluate"]["possible"] and len(facts["files"]) == 15
    truncate(folder / "checkpoint-6/optimizer.pt")
    assert cli.main(["inspect", str(folder), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["damaged"] == ["checkpoint-6"] and facts["resumes"] == str(folder / "checkpoint-20")
    assert [entry["name"] for entry in facts["checkpoints"]] == [f"checkpoint-{n}" for n in (20, 18, 12, 6)]


def test_a_folder_is_inspected_from_inside(run, monkeypatch, capsys):
    folder = run("wsd")
    monkeypatch.chdir(folder / "checkpoint-18")
    text = inspect(".", capsys)[1]
    assert (
        f"--extend_from {folder} --max_steps N" in text and f'load_evaluation_model("{folder}/checkpoint-18")' in text
    )


def test_nothing_is_written(run, capsys):
    folder = run("wsd_s")
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = snapshot(folder)
        assert inspect(folder, capsys)[0] == 0
        assert snapshot(folder) == before
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_control_characters_do_not_reach_the_terminal(made_by_stock, tmp_path, capsys):
    checkpoint = Path(shutil.copytree(made_by_stock / "checkpoint-5", tmp_path / "checkpoint-5"))
    (checkpoint / "a\x1b[2Jb").write_text("x", encoding="utf-8")
    cli.main(["inspect", str(checkpoint)])
    output = capsys.readouterr().out
    assert "a?[2Jb" in output and "\x1b" not in output


def test_the_sample_in_the_readme(run, monkeypatch, capsys):
    folder = run("wsd")
    (folder.parent / "runs").mkdir()
    folder.rename(folder.parent / "runs/wsd")
    (folder.parent / "runs/wsd/checkpoint-12/optimizer.pt").unlink()
    monkeypatch.chdir(folder.parent)
    assert cli.main(["inspect", "runs/wsd"]) == 1
    output = capsys.readouterr().out.splitlines()
    sample = re.search(r"<!-- sample.*?```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[1]
    missing = [line for line in sample.splitlines() if line not in output]
    assert missing == []


def test_a_zip_bomb_for_arguments_is_passed_over(run, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    with zipfile.ZipFile(checkpoint / "training_args.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**22))
    assert pickled_attributes(checkpoint / "training_args.bin") == {}
    assert inspect(checkpoint, capsys)[0] == 1
