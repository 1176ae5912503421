"""`hf-radam average`: the merged model, what is refused, and the memory it takes.

Oracles: sums in float64 of the tensors as safetensors loads them; `from_pretrained`; the kernel's count of memory.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from constant_runs import UPDATES, tokenizer, train
from inspecting import flip, snapshot, stock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_radam import RAdamTrainer, cli
from hf_radam.checkpoints import weights as weight_files
from hf_radam.checkpoints.weights import Tensors, write_weights
from hf_radam.cli.merging import coefficients

ROOT = Path(__file__).parents[2]
KINDS = ("uniform", "ewa", "linear", "cosine", "1-sqrt")


def average(folders, output, *options):
    """Run the command; returns its exit code."""
    return cli.main(["average", *map(str, folders), "-o", str(output), *options])


def expected(folders, weights, steps=UPDATES, **options):
    """The merge in float64, with numpy."""
    files = [safetensors.torch.load_file(folder / "model.safetensors") for folder in folders]
    factors = coefficients(steps[-len(folders) :], weights=weights, **options)
    return {
        name: sum(c * file[name].double().numpy() for c, file in zip(factors, files, strict=True)) for name in files[-1]
    }


def agrees(folder, wanted):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Each of at most 4 additions in float32 rounds by 2^-24 of the sum, of numbers of this size.
        limit = 8 * 2**-24 * max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(found[name].double().numpy(), value, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("weights", KINDS)
def test_every_tensor_is_the_weighted_sum(checkpoints, tmp_path, weights):
    assert average(checkpoints[::-1], tmp_path / "merged", "--weights", weights) == 0
    agrees(tmp_path / "merged", expected(checkpoints, weights))


MODELS = {"tied": tiny.tied, "bf16": tiny.bf16, "mixtral": tiny.mixtral, "float64": tiny.float64}


@pytest.mark.parametrize("kind", MODELS)
def test_other_models_load_as_the_weighted_sum(tmp_path, kind):
    options = {"optim": "adamw_torch"} if kind == "bf16" else {}  # RAdam warns of parameters in bf16
    folders = train(tmp_path / "run", MODELS[kind](), **options)
    assert average(folders, tmp_path / "merged", "--weights", "linear") == 0
    agrees(tmp_path / "merged", expected(folders, "linear"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == (torch.float64 if kind == "float64" else torch.float32)
    each = [dict(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).named_parameters()) for f in folders]
    factors = coefficients(UPDATES, weights="linear")
    for name, parameter in loaded.named_parameters():
        wanted = sum(c * one[name].detach() for c, one in zip(factors, each, strict=True))
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_folder_is_complete(checkpoints, tmp_path, capsys):
    folder = tmp_path / "new" / "merged"
    assert average(checkpoints, folder, "--weights", "1-sqrt") == 0
    output = capsys.readouterr()
    assert output.err == "" and f"written to {folder}" in output.out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tiny.loss_of(model) > 0 and model.generation_config is not None
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer().chat_template
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "hf_radam_average.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert folder.stat().st_mode & 0o777 == checkpoints[0].stat().st_mode & 0o777
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    record = json.loads((folder / "hf_radam_average.json").read_text("utf-8"))
    factors = coefficients(UPDATES, weights="1-sqrt")
    assert record["weights"] == "1-sqrt"
    parts = [(part["update"], part["weight"]) for part in record["checkpoints"]]
    assert parts == list(zip(UPDATES, factors, strict=True))
    assert [(folder / part["path"]).resolve() for part in record["checkpoints"]] == [c.resolve() for c in checkpoints]
    printed = re.findall(r"checkpoint-(\d+) +(\d+) +([\d.]+) +(\S+)$", output.out, re.MULTILINE)
    rows = [(step, step, round(factor, 4)) for step, factor in zip(UPDATES, factors, strict=True)]
    assert [(int(a), int(b), float(c)) for a, b, c, _ in printed] == rows
    rest = [1 - sum(factors[:index]) for index in range(1, 4)]
    assert [last for *_, last in printed] == ["fully", *(f"{value:.4f}" for value in rest)]


def test_several_files_are_read_and_written(tmp_path, monkeypatch):
    stock(tmp_path / "run", lr_scheduler_type="constant").train()
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (5, 10)]
    wanted = expected(folders, "ewa", [5, 10], decay=0.8)
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", 20_000)
    for folder in folders:  # the same weights again, in several files
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        like = {name: tensor.to("meta") for name, tensor in weights.items()}
        write_weights(folder, None, Tensors(like, weights.__getitem__), writes=True)
    options = ["--weights", "ewa", "--decay", "0.8"]
    assert average(folders, tmp_path / "many", *options) == 0
    monkeypatch.undo()
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert average(folders, tmp_path / "one", *options) == 0
    assert not (tmp_path / "one/model.safetensors.index.json").exists()  # of the checkpoint
    for name in ("many", "one"):
        agrees(tmp_path / name, wanted)
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


class WithBatchNorm(nn.Module):
    """A classifier whose state has counts, statistics and a mask with infinite entries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.layers[0].bias.requires_grad_(False)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), float("inf")]))

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


def test_statistics_and_equal_values_are_those_of_the_last_checkpoint(tmp_path, capsys):
    options = {"optim": "radam", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 10}
    rows = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(n)), "labels": n % 3} for n in range(64)]
    RAdamTrainer(WithBatchNorm(), tiny.arguments(tmp_path / "run", **options), train_dataset=rows).train()
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (10, 20)]
    assert average(folders, tmp_path / "merged", "--weights", "linear") == 0
    assert "hf_radam.recalibrate_batch_norm before evaluating" in capsys.readouterr().err
    first, last, merged = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (*folders, tmp_path / "merged")
    )
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        key = f"layers.1.{name}"
        assert torch.equal(merged[key], last[key]) and not torch.equal(first[key], last[key])
    assert torch.equal(merged["mask"], last["mask"]) and torch.equal(merged["layers.0.bias"], last["layers.0.bias"])
    a, b = coefficients([10, 20], weights="linear")
    torch.testing.assert_close(merged["layers.0.weight"], a * first["layers.0.weight"] + b * last["layers.0.weight"])


def test_notes(checkpoints, tmp_path, capsys):
    def notes(folders, weights="uniform"):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        capsys.readouterr()
        assert average(folders, tmp_path / "merged", "--weights", weights) == 0
        return capsys.readouterr().err.splitlines()

    free = train(tmp_path / "free", tiny.llama(), optim="radam_schedulefree")
    (note,) = notes([checkpoints[0], free[1]])
    assert "its y is averaged" in note
    wsd = train(tmp_path / "wsd", tiny.llama(), lr_scheduler_type="wsd", decay_steps=8)
    (note,) = notes(wsd, "linear")
    assert "note: the learning rate was not constant from step 6 to 20 (wsd)" in note
    assert notes(wsd[:2], "linear") == notes(wsd) == []  # the decay begins after step 12


def refused(words, capsys, code):
    """The last line on stderr of a command that ends with this code and prints nothing else."""
    capsys.readouterr()
    try:
        assert cli.main(words) == code
    except SystemExit as ended:
        assert ended.code == code
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()[-1]


def test_bad_input_is_one_sentence(checkpoints, made_by_stock, tmp_path, capsys, monkeypatch):
    one, two, *_ = map(str, checkpoints)
    twin, other, renamed = tmp_path / "twin/checkpoint-6", tmp_path / "other/checkpoint-5", tmp_path / "renamed"
    shutil.copytree(one, twin)
    shutil.copytree(made_by_stock / "checkpoint-5", other)
    adapter, binary, quantized = (tmp_path / name / "checkpoint-5" for name in ("adapter", "binary", "quantized"))
    for folder, file in ((adapter, "adapter_model.safetensors"), (binary, "pytorch_model.bin")):
        shutil.copytree(other, folder)
        (folder / "model.safetensors").rename(folder / file)
    shards = tmp_path / "shards/checkpoint-5"
    shutil.copytree(other, shards)
    (shards / "model.safetensors").unlink()
    (shards / "pytorch_model_fsdp_0").mkdir()
    shutil.copytree(other, quantized)
    config = json.loads((quantized / "config.json").read_text("utf-8")) | {"quantization_config": {"bits": 4}}
    (quantized / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tiny.llama(num_hidden_layers=1).save_pretrained(other)
    renamed.mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine", encoding="utf-8")
    before = snapshot(tmp_path)
    cases = {
        (one,): "1 checkpoint cannot be averaged. Give two or more.",
        (one, str(twin)): "are both of step 6. Leave one out.",
        (one, "nowhere"): "nowhere is not a checkpoint. Give folders checkpoint-N",
        (one, str(Path(one).parent)): "is not a checkpoint. Give folders checkpoint-N",
        (one, str(renamed)): "is not a checkpoint. Give folders checkpoint-N",
        (two, str(other)): f"{other} is of another model than {two}: ",
        (one, str(quantized)): "quantization_config is {'bits': 4}, not None",
        (one, str(adapter)): "holds an adapter. Only complete models",
        (one, str(binary)): "has no safetensors weights",
        (one, str(shards)): f"Join them first: hf-radam consolidate {shards} --training_weights",
        (one, two, "--decay", "0.9"): "have no effect on weights='linear'",
        (one, two, "--weights", "mean"): "invalid choice: 'mean'",
    }
    end = ["--weights", "linear", "-o", str(tmp_path / "merged")]
    for words, sentence in cases.items():
        assert sentence in refused(["average", *end, *words], capsys, 2), words
    for taken in (full, full / "notes.txt"):
        words = ["average", one, two, "--weights", "linear", "-o", str(taken)]
        assert f"{taken} is not an empty folder. Output folders must be empty." in refused(words, capsys, 2)
    monkeypatch.chdir(renamed)
    assert "is the current folder" in refused(["average", one, two, "--weights", "linear", "-o", "."], capsys, 2)
    assert snapshot(tmp_path) == before


def test_a_failure_has_code_1_and_leaves_nothing(checkpoints, tmp_path, capsys):
    run = Path(shutil.copytree(checkpoints[0].parent, tmp_path / "run"))
    folders = [str(run / f"checkpoint-{step}") for step in UPDATES]
    end = ["--weights", "linear", "-o"]
    too_long = str(tmp_path / (300 * "n") / "merged")
    assert "File name too long" in refused(["average", *folders, *end, too_long], capsys, 1)
    flip(run / "checkpoint-12/model.safetensors")
    line = refused(["average", *folders, *end, str(tmp_path / "merged")], capsys, 1)
    assert line.startswith("hf-radam average: The checkpoint is corrupted: ")
    assert "checkpoint-12/model.safetensors" in line
    stock(tmp_path / "stock", lr_scheduler_type="constant").train()
    folders = [tmp_path / "stock" / f"checkpoint-{step}" for step in (5, 10)]
    weights = safetensors.torch.load_file(folders[0] / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, folders[0] / "model.safetensors", metadata={"format": "pt"})
    line = refused(["average", *map(str, folders), *end, str(tmp_path / "merged")], capsys, 1)
    assert line == f"hf-radam average: model.norm.weight is NaN in {folders[0]}."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "stock"]


MEASURE = """
import ctypes, json, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from hf_radam.cli.merging import merge, read_sources
from hf_radam.checkpoints import weights
from hf_radam.checkpoints.weights import Tensors

folder, rows = Path(sys.argv[1]), 2**19
folders = [folder / f"checkpoint-{number}" for number in (1, 2, 3, 4)]
if sys.argv[2] == "make":
    like = {f"{number:02d}": torch.empty(rows, 4, dtype=torch.bfloat16, device="meta") for number in range(8)}
    for number, path in enumerate(folders, 1):
        path.mkdir()
        (path / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": []}))
        tensors = Tensors(like, lambda key: torch.full((rows, 4), number, dtype=torch.bfloat16))
        weights.write_weights(path, None, tensors, writes=True)
    sys.exit()

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def run(count, name, size):
    weights.MAX_FILE_BYTES = size
    merge(read_sources(folders[:count]), [1 / count] * count, folder / name, weights="uniform")

run(2, "first", 9 * 2**20)  # what it takes once
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
run(4, "merged", int(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="has the kernel count the peak anew")
def test_it_takes_the_memory_of_a_tensor_and_a_file(tmp_path):
    """Tensors of 4 MB in bf16, 8 MB in float32; 32 MB a checkpoint, 128 MB all, 64 MB the model that is written."""

    def command(word):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
        call = [sys.executable, "-c", MEASURE, str(tmp_path), word]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("make")
    small = int(command(str(9 * 2**20)))
    with safetensors.safe_open(next((tmp_path / "merged").glob("model-00008*")), "pt") as file:
        assert torch.equal(file.get_tensor("07")[:3], torch.full((3, 4), 2.5))
    for name in ("first", "merged"):
        shutil.rmtree(tmp_path / name)
    large = int(command(str(10**9)))
    tensor, model = 8 * 2**20, 64 * 2**20
    assert small < 6 * tensor < model < large < model + 6 * tensor, (small / 2**20, large / 2**20)
