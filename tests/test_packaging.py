"""Installed as a package, outside the checkout: a plain loop, a training and the command work.

The loop works on a read-only machine, too. The wheel is built from the sdist and installed into an environment of its
own, which sees the other packages of this one by a .pth file; nothing is downloaded. Oracles: where the modules come
from, exit codes, and whether a library was compiled. Machines without a compiler: `test_fused.py`.
"""

import os
import shutil
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import limits
import pytest

ROOT = Path(__file__).parents[1]
PARTS = "hf_radam pyproject.toml README.md LICENSE".split()
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{0}(sys.argv[1])"
LOOP = """
import sys, torch, hf_radam
from hf_radam import RAdam, RAdamScheduleFree, WeightAverage
assert hf_radam.__file__.startswith(sys.prefix), hf_radam.__file__
for kind in (RAdam, RAdamScheduleFree):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = kind(model.parameters(), lr=0.05, fused=True)
    average = WeightAverage(model.named_parameters())
    getattr(optimizer, "train", lambda: None)()
    inputs = torch.randn(64, 8)
    losses = []
    for step in range(1, 21):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(step)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with average.applied():
        model(inputs)
"""
TRAINING = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_radam import RAdamTrainer, RAdamTrainingArguments, load_evaluation_model
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
for method in ({"optim": "radam", "lr_scheduler_type": "wsd", "ewa": True}, {"optim": "radam_schedulefree"}):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    common = {"max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = RAdamTrainingArguments(f"run_{method['optim']}", **common, **method)
    trainer = RAdamTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    shipped = load_evaluation_model(f"{args.output_dir}/checkpoint-4")
    again = RAdamTrainer(shipped, RAdamTrainingArguments("again", optim="radam", **common), eval_dataset=rows)
    assert abs(again.evaluate()["eval_loss"] - loss) < 1e-6
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the unpacked sdist of a copy of the sources."""
    folder = tmp_path_factory.mktemp("built")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    assert limits.run([sys.executable, "-c", BUILD.format("sdist"), folder], cwd=folder).returncode == 0
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    done = limits.run([sys.executable, "-c", BUILD.format("wheel"), folder], cwd=source)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """An empty environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    Path(paths["purelib"], "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    options = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", built]
    done = limits.run([sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *options])
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_has_every_module_and_what_is_read_at_run_time(built):
    with zipfile.ZipFile(built) as archive:
        inside = {name for name in archive.namelist() if name.startswith("hf_radam/")}
    kinds = (".py", ".cpp", ".typed")
    here = {file.relative_to(ROOT).as_posix() for file in (ROOT / "hf_radam").rglob("*") if file.suffix in kinds}
    assert inside == here and {name for name in here if name.endswith(".cpp")} and "hf_radam/py.typed" in here


@pytest.mark.parametrize("machine", ["ordinary", "read-only"])
def test_it_works_outside_the_checkout(environment, tmp_path, machine):
    prefix, work, cache = [], tmp_path / "work", tmp_path / "cache"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(tmp_path / "hub")}
    work.mkdir()
    if machine == "read-only":
        cache.write_text("in the way of the folder")
        variables["PYTHONDONTWRITEBYTECODE"] = "1"
        for folder in [environment, *environment.rglob("*")]:
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o555)
        if os.geteuid() == 0 and (setpriv := shutil.which("setpriv")):  # root may write everywhere
            prefix = [setpriv, "--bounding-set=-dac_override", "--inh-caps=-dac_override"]

    def run(*command):
        done = limits.run([*prefix, *command], cwd=work, env=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(environment / "bin" / "python", "-c", LOOP if machine == "read-only" else LOOP + TRAINING)
    if machine == "ordinary":
        assert len([*cache.glob("hf_radam/*.so")]) == 1
        assert "checkpoint-4" in run(environment / "bin" / "hf-radam", "inspect", "run_radam")
