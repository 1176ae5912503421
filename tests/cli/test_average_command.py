"""`hf-radam average`: the merged model, what it refuses, and the memory it takes.

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
from inspecting import flip, snapshot, stock
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, default_data_collator

from hf_radam import RAdamTrainer, cli
from hf_radam.checkpoints.models.weight_files import Tensors, write_weights
from hf_radam.merging.coefficients import WEIGHTS, coefficients
from hf_radam.merging.folder import merge

ROOT = Path(__file__).parents[2]
UPDATES = [6, 12, 18, 20]


def tokenizer():
    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, tiny.VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def train(folder, model, **options):
    """A run at a constant learning rate with checkpoints after 6, 12, 18 and 20 updates."""
    options = {"optim": "radam", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 6} | options
    args = tiny.arguments(folder, **options)
    parts = {"processing_class": tokenizer(), "data_collator": default_data_collator}
    RAdamTrainer(model, args, train_dataset=tiny.TRAIN, **parts).train()
    return [folder / f"checkpoint-{update}" for update in UPDATES]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return train(tmp_path_factory.mktemp("constant"), tiny.llama())


def expected(folders, weights, **options):
    """The merge in float64, with numpy."""
    files = [safetensors.torch.load_file(folder / "model.safetensors") for folder in folders]
    factors = coefficients(UPDATES[-len(folders) :], weights=weights, **options)
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
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_tensor_is_the_weighted_sum(checkpoints, tmp_path, weights):
    merge(checkpoints[::-1], tmp_path / "merged", weights=weights)
    agrees(tmp_path / "merged", expected(checkpoints, weights))


MODELS = {"tied": tiny.tied, "bf16": tiny.bf16, "mixtral": tiny.mixtral, "float64": tiny.float64}


@pytest.mark.parametrize("kind", MODELS)
def test_other_models_load_as_the_weighted_sum(tmp_path, kind):
    options = {"optim": "adamw_torch"} if kind == "bf16" else {}  # ours warn of parameters in bf16
    folders = train(tmp_path / "run", MODELS[kind](), **options)
    merge(folders, tmp_path / "merged", weights="linear")
    agrees(tmp_path / "merged", expected(folders, "linear"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == (torch.float64 if kind == "float64" else torch.float32)
    each = [dict(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).named_parameters()) for f in folders]
    factors = coefficients(UPDATES, weights="linear")
    for name, parameter in loaded.named_parameters():
        wanted = sum(c * one[name].detach() for c, one in zip(factors, each, strict=True))
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_folder_is_complete(checkpoints, tmp_path, capsys):
    words = [str(path) for path in checkpoints]
    assert cli.main(["average", *words, "--weights", "1-sqrt", "-o", str(tmp_path / "new" / "merged")]) == 0
    output = capsys.readouterr()
    folder = tmp_path / "new" / "merged"
    assert output.err == "" and f"written to {folder}" in output.out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tiny.loss_of(model) > 0 and model.generation_config is not None
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer().chat_template
    names = {file.name for file in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "hf_radam_average.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert folder.stat().st_mode & 0o777 == checkpoints[0].stat().st_mode & 0o777
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    record = json.loads((folder / "hf_radam_average.json").read_text("utf-8"))
    factors = coefficients(UPDATES, weights="1-sqrt")
    assert record["weights"] == "1-sqrt"
    assert [(part["update"], part["weight"]) for part in record["checkpoints"]] == list(
        zip(UPDATES, factors, strict=True)
    )
    printed = re.findall(r"checkpoint-(\d+) +(\d+) +([\d.]+) +(\S+)$", output.out, re.MULTILINE)
    assert [(int(a), int(b), float(c)) for a, b, c, _ in printed] == [
        (update, update, round(factor, 4)) for update, factor in zip(UPDATES, factors, strict=True)
    ]
    rest = [1 - sum(factors[:index]) for index in range(1, 4)]
    assert [last for *_, last in printed] == ["fully", *(f"{value:.4f}" for value in rest)]


def test_many_files_hold_the_same_numbers(checkpoints, tmp_path, capsys):
    words = [str(path) for path in checkpoints]
    end = ["--weights", "ewa", "--decay", "0.8", "--max_file_size", "20KB", "-o", str(tmp_path / "merged")]
    assert cli.main(["average", *words, *end]) == 0
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    agrees(tmp_path / "merged", expected(checkpoints, "ewa", decay=0.8))
    once = merge(checkpoints, tmp_path / "whole", weights="ewa", decay=0.8)
    assert [source.update for source in once.sources] == UPDATES
    two = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "whole")]
    assert tiny.same(*map(tiny.parameters, two))


def test_sharded_files_and_stock_checkpoints_are_read(tmp_path):
    stock(tmp_path / "run", lr_scheduler_type="constant").train()
    folders = [tmp_path / "run" / f"checkpoint-{update}" for update in (5, 10)]
    wanted = expected_of(folders, [5, 10])
    for folder in folders:  # the same weights again, in several files
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        like = {name: tensor.to("meta") for name, tensor in weights.items()}
        write_weights(folder, None, Tensors(like, weights.__getitem__), writes=True, max_bytes=20_000)
    assert merge(folders, tmp_path / "merged", weights="cosine").notes == []
    agrees(tmp_path / "merged", wanted)
    assert not (tmp_path / "merged/model.safetensors.index.json").exists()  # of the checkpoint


def expected_of(folders, updates):
    files = [safetensors.torch.load_file(folder / "model.safetensors") for folder in folders]
    factors = coefficients(updates, weights="cosine")
    return {name: sum(c * f[name].double().numpy() for c, f in zip(factors, files, strict=True)) for name in files[0]}


def test_what_did_not_train_stays_the_same_bit_for_bit(tmp_path):
    folders = train(tmp_path / "run", tiny.partly_frozen())
    merge(folders, tmp_path / "merged", weights="1-sqrt")
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (folders[0], tmp_path / "merged"))
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["model.embed_tokens.weight"]


class WithBatchNorm(nn.Module):
    """A classifier whose state has counts, statistics and a mask with infinite entries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), float("inf")]))

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


def test_statistics_and_masks_are_those_of_the_last_checkpoint(tmp_path, capsys):
    options = {"optim": "radam", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 10}
    rows = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(n)), "labels": n % 3} for n in range(64)]
    RAdamTrainer(WithBatchNorm(), tiny.arguments(tmp_path / "run", **options), train_dataset=rows).train()
    folders = [tmp_path / "run" / f"checkpoint-{update}" for update in (10, 20)]
    words = [str(path) for path in folders]
    assert cli.main(["average", *words, "--weights", "uniform", "-o", str(tmp_path / "merged")]) == 0
    assert "take them again with hf_radam.recalibrate_batch_norm" in capsys.readouterr().err
    first, last, merged = (
        safetensors.torch.load_file(f / "model.safetensors") for f in (*folders, tmp_path / "merged")
    )
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        key = f"layers.1.{name}"
        assert torch.equal(merged[key], last[key]) and not torch.equal(first[key], last[key])
    assert torch.equal(merged["mask"], last["mask"])
    for key in ("layers.0.weight", "layers.1.bias"):
        torch.testing.assert_close(merged[key], (first[key] + last[key]) / 2)


def test_a_decay_on_top_of_a_decay_is_noted(tmp_path):
    folders = train(tmp_path / "wsd", tiny.llama(), lr_scheduler_type="wsd", decay_steps=8)
    (note,) = merge(folders, tmp_path / "all", weights="linear").notes
    assert note.startswith("the learning rate of updates 7-20 was not constant (wsd)")
    assert merge(folders[:2], tmp_path / "stable", weights="linear").notes == []  # the decay begins after update 12
    assert merge(folders, tmp_path / "mean", weights="uniform").notes == []
    stock(tmp_path / "stock").train()
    folders = [tmp_path / "stock" / f"checkpoint-{update}" for update in (5, 10)]
    (note,) = merge(folders, tmp_path / "linear", weights="1-sqrt").notes
    assert "not constant (linear)" in note


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


def test_bad_input_is_one_sentence(checkpoints, tmp_path, capsys):
    one, two, *_ = map(str, checkpoints)
    twin, other, renamed = tmp_path / "twin/checkpoint-7", tmp_path / "other/checkpoint-7", tmp_path / "renamed"
    shutil.copytree(one, twin)
    shutil.copytree(one, other)
    tiny.llama(num_hidden_layers=1).save_pretrained(other)
    (other / "hf_radam.json").unlink()
    state = json.loads((other / "trainer_state.json").read_text("utf-8"))
    del state["stateful_callbacks"]["hf_radam"]
    (other / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    adapter, binary = tmp_path / "adapter/checkpoint-7", tmp_path / "binary/checkpoint-7"
    for folder, file in ((adapter, "adapter_model.safetensors"), (binary, "pytorch_model.bin")):
        shutil.copytree(other, folder)
        (folder / "model.safetensors").rename(folder / file)
    shards = tmp_path / "shards/checkpoint-7"
    shutil.copytree(other, shards)
    (shards / "model.safetensors").unlink()
    (shards / "pytorch_model_fsdp_0").mkdir()
    shutil.copytree(one, renamed)
    (renamed / "hf_radam.json").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine", encoding="utf-8")
    before = snapshot(tmp_path)
    cases = {
        (one,): "1 checkpoint cannot be averaged: give two or more.",
        (one, one): "are both of update 6: leave one out.",
        (one, str(twin)): "are both of update 6: leave one out.",
        (one, "nowhere"): "nowhere is no folder: give checkpoints",
        (one, str(Path(one).parent)): "is no checkpoint: give folders checkpoint-N",
        (one, str(renamed)): "is no checkpoint: give folders checkpoint-N",
        (two, str(other)): f"{other} is of another model than {two}: without model.layers.1.",
        (one, str(adapter)): "holds an adapter: only the weights of whole models",
        (one, str(binary)): "has its weights in .bin files: only safetensors",
        (one, str(shards)): f"put each together first, with hf-radam consolidate {shards} --training_weights",
        (one, two, "--decay", "0.9"): "they have no effect on 'linear'",
        (one, two, "--max_file_size", "much"): "'much' is no size: write 500MB or 5GB",
        (one, two, "--max_file_size", "0"): "0 bytes cannot hold weights",
    }
    end = ["--weights", "linear", "-o", str(tmp_path / "merged")]
    for words, sentence in cases.items():
        assert sentence in refused(["average", *words, *end], capsys, 2), words
    for taken in (full, full / "notes.txt"):
        words = ["average", one, two, "--weights", "linear", "-o", str(taken)]
        assert f"{taken} is there already and not empty" in refused(words, capsys, 2)
    assert "invalid choice: 'mean'" in refused(["average", one, two, "--weights", "mean", "-o", "x"], capsys, 2)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("key", ["rope_theta", "quantization_config"])
def test_another_configuration_is_another_model(tmp_path, capsys, key):
    stock(tmp_path, lr_scheduler_type="constant").train()
    folders = [tmp_path / f"checkpoint-{update}" for update in (5, 10)]
    config = json.loads((folders[1] / "config.json").read_text("utf-8")) | {key: {"bits": 4}}
    for folder in folders[key == "rope_theta" :]:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = {"rope_theta": "its rope_theta is None, not {'bits': 4}", "quantization_config": "is quantized"}[key]
    end = ["--weights", "linear", "-o", str(tmp_path / "merged")]
    assert words in refused(["average", *map(str, folders), *end], capsys, 2)


def test_damage_is_told_with_code_1_and_nothing_is_left(checkpoints, tmp_path, capsys):
    run = Path(shutil.copytree(checkpoints[0].parent, tmp_path / "run"))
    flip(run / "checkpoint-12/model.safetensors")
    words = [str(run / f"checkpoint-{update}") for update in UPDATES]
    end = ["--weights", "linear", "-o", str(tmp_path / "merged")]
    line = refused(["average", *words, *end], capsys, 1)
    assert line.startswith("hf-radam average: The checkpoint is damaged") and "checkpoint-12/model.safetensors" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_not_numbers_are_told(tmp_path, capsys):
    stock(tmp_path / "run", lr_scheduler_type="constant").train()
    folders = [tmp_path / "run" / f"checkpoint-{update}" for update in (5, 10)]
    weights = safetensors.torch.load_file(folders[0] / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, folders[0] / "model.safetensors", metadata={"format": "pt"})
    end = ["--weights", "linear", "-o", str(tmp_path / "merged")]
    line = refused(["average", *map(str, folders), *end], capsys, 1)
    assert line == f"hf-radam average: model.norm.weight is not a number in {folders[0]}."
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


MEASURE = """
import ctypes, json, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from hf_radam.merging.folder import merge
from hf_radam.checkpoints.models.weight_files import Tensors, write_weights

folder, rows = Path(sys.argv[1]), 2**19
folders = [folder / f"checkpoint-{number}" for number in (1, 2, 3, 4)]
if sys.argv[2] == "make":
    like = {f"{number:02d}": torch.empty(rows, 4, dtype=torch.bfloat16, device="meta") for number in range(16)}
    for number, path in enumerate(folders, 1):
        path.mkdir()
        (path / "trainer_state.json").write_text(json.dumps({"global_step": number, "log_history": []}))
        write_weights(path, None, Tensors(like, lambda key: torch.full((rows, 4), number, dtype=torch.bfloat16)),
                      writes=True, max_bytes=10**9)
    sys.exit()

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

merge(folders[:2], folder / "first", weights="uniform", max_file_bytes=9 * 2**20)  # what it takes once
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
merge(folders, folder / "merged", weights="uniform", max_file_bytes=int(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="has the kernel count the peak anew")
def test_it_takes_the_memory_of_a_tensor_and_a_file(tmp_path):
    """Tensors of 4 MB in bf16, 8 MB in float32; 64 MB a checkpoint, 256 MB all, 128 MB the model that is written."""

    def command(word):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
        call = [sys.executable, "-c", MEASURE, str(tmp_path), word]
        return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)

    assert command("make").returncode == 0
    done = command(str(9 * 2**20))
    assert done.returncode == 0, done.stderr
    small = int(done.stdout)
    with safetensors.safe_open(next((tmp_path / "merged").glob("model-00016*")), "pt") as file:
        assert torch.equal(file.get_tensor("15")[:3], torch.full((3, 4), 2.5))
    for name in ("first", "merged"):
        shutil.rmtree(tmp_path / name)
    large = int(command(str(10**9)).stdout)
    tensor, model = 8 * 2**20, 128 * 2**20
    assert small < 6 * tensor < model < large < model + 6 * tensor, (small / 2**20, large / 2**20)
