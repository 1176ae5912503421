"""`hf-radam average`: the merged model.

Oracles: sums in float64 of the tensors as safetensors loads them; `from_pretrained`.
"""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from constant_runs import UPDATES, tokenizer, train
from inspecting import stock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_radam import RAdamTrainer, cli
from hf_radam.checkpoints.weights import Tensors, write_weights
from hf_radam.merging.coefficients import WEIGHTS, coefficients
from hf_radam.merging.folder import merge


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
    assert [(folder / part["path"]).resolve() for part in record["checkpoints"]] == [c.resolve() for c in checkpoints]
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


def test_different_methods_and_runs_are_noted(checkpoints, tmp_path, capsys):
    logs = {"logging_strategy": "steps", "logging_steps": 2}
    one = train(tmp_path / "one", tiny.llama(), **logs)
    same = train(tmp_path / "same", tiny.llama(), **logs)
    other = train(tmp_path / "other", tiny.llama(), learning_rate=0.02, **logs)
    free = train(tmp_path / "free", tiny.llama(), optim="radam_schedulefree", **logs)

    def notes(*folders):
        words = ["average", *map(str, folders), "--weights", "uniform", "-o", str(tmp_path / "merged")]
        capsys.readouterr()
        assert cli.main(words) == 0
        shutil.rmtree(tmp_path / "merged")
        return capsys.readouterr().err.splitlines()

    assert notes(*one) == [] and notes(*checkpoints) == []
    assert notes(one[0], same[1]) == []  # nobody could tell them apart
    (note,) = notes(one[0], other[1])
    assert f"note: {one[0]} and {other[1]} are not of one run: the training losses that they logged at update " in note
    (note,) = notes(*free)
    assert note.endswith("are of a schedule-free run: merged is y, which trains, not x, which is an average already.")
    methods, y, runs = notes(one[0], free[1])
    assert f"{one[0]} was trained with optim=radam, {free[1]} with optim=radam_schedulefree: " in methods
    averaged = train(tmp_path / "averaged", tiny.llama(), ewa=True, **logs)
    assert notes(one[0], averaged[1]) == []  # the weights that train, and are merged, are the same
    assert f"{free[1]} is of a schedule-free run" in y and "are not of one run" in runs


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
