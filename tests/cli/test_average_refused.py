"""`hf-radam average`: what it refuses, and the memory it takes.

Oracles: the words and the exit code; the files as they were; the kernel's count of memory.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import limits
import pytest
import safetensors.torch
import tiny
import torch
from constant_runs import UPDATES
from inspecting import flip, snapshot, stock

from hf_radam import cli

ROOT = Path(__file__).parents[2]


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


def test_a_place_that_cannot_be_taken_is_told_before_merging(checkpoints, tmp_path, capsys, monkeypatch):
    words = ["average", *map(str, checkpoints[:2]), "--weights", "linear", "-o"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", str(tmp_path / "here"), "../here/"):
        assert "is the folder you are in, which cannot be replaced" in refused([*words, name], capsys, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "new")
    for link, folder in (("link", "empty"), ("nowhere", "new")):
        assert cli.main([*words, f"../{link}"]) == 0
        assert (tmp_path / link).is_symlink() and (tmp_path / folder / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "here", "link", "new", "nowhere"]


def test_a_place_that_cannot_be_made_leaves_nothing(checkpoints, tmp_path, capsys):
    into = tmp_path / "new" / (300 * "n") / "merged"
    words = ["average", *map(str, checkpoints), "--weights", "uniform", "-o", str(into)]
    assert "File name too long" in refused(words, capsys, 1)
    assert list(tmp_path.iterdir()) == []


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
from hf_radam.checkpoints.weights import Tensors, write_weights

folder, rows = Path(sys.argv[1]), 2**19
folders = [folder / f"checkpoint-{number}" for number in (1, 2, 3, 4)]
if sys.argv[2] == "make":
    like = {f"{number:02d}": torch.empty(rows, 4, dtype=torch.bfloat16, device="meta") for number in range(8)}
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
    """Tensors of 4 MB in bf16, 8 MB in float32; 32 MB a checkpoint, 128 MB all, 64 MB the model that is written."""

    def command(word):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
        call = [sys.executable, "-c", MEASURE, str(tmp_path), word]
        return limits.run(call, env=environment)

    assert command("make").returncode == 0
    done = command(str(9 * 2**20))
    assert done.returncode == 0, done.stderr
    small = int(done.stdout)
    with safetensors.safe_open(next((tmp_path / "merged").glob("model-00008*")), "pt") as file:
        assert torch.equal(file.get_tensor("07")[:3], torch.full((3, 4), 2.5))
    for name in ("first", "merged"):
        shutil.rmtree(tmp_path / name)
    large = int(command(str(10**9)).stdout)
    tensor, model = 8 * 2**20, 64 * 2**20
    assert small < 6 * tensor < model < large < model + 6 * tensor, (small / 2**20, large / 2**20)
