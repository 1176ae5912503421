"""The scripts from end to end: `accelerate launch` trains a tiny model, `evaluate_clm.py` finds its loss again.

Oracles: `eval_results.json`, which the trainer wrote; the loss of the folder `ewa/` loaded by plain transformers.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from clm_arguments import ModelArguments
from clm_model import build_model, load_named_config, resolve_block_size
from clm_parser import InputError
from evaluate_clm import folders, load_data, mean_loss, read_recipe, same_weights
from evaluate_clm import parse_arguments as parse_evaluation
from hf_radam import RAdamTrainingArguments, cli
from hf_radam.merging.folder import RECORD_NAME
from run_clm import check_processes, checkpoint_to_resume

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WORDS = "def return class import self value name list text number".split()


def run(*command, cwd):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "home"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def launch(*arguments, cwd):
    options = ("--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
    return run("-m", "accelerate.commands.launch", *options, EXAMPLES / "run_clm.py", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run of six updates: RAdam and EWA, a checkpoint at 3 and at 6."""
    folder = tmp_path_factory.mktemp("run_clm")
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for i in range(20):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=200)))
    settings = {
        "train_file": "texts",
        "validation_split_percentage": 20,
        "block_size": 32,
        "vocab_size": 300,
        "config_overrides": "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2,"
        "num_key_value_heads=2",
        "optim": "radam",
        "ewa": True,
        "learning_rate": 0.05,  # large, so that averaged and training weights differ
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 7,  # leaves an incomplete last batch
        "output_dir": "run",
        "token": "secret",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    done = launch("run.yaml", "--ewa_eval_raw", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_run_leaves_model_metrics_and_recipe(folder):
    results = json.loads((folder / "run" / "eval_results.json").read_text())
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-5)
    assert results["eval_raw_loss"] != results["eval_loss"]
    recipe = read_recipe(folder / "run" / "checkpoint-3")
    assert recipe["data"]["block_size"] == 32
    assert "secret" not in (folder / "run" / "run_clm.yaml").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")
    model = AutoModelForCausalLM.from_pretrained(folder / "run")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert (model.config.eos_token_id, model.config.max_position_embeddings) == (tokenizer.eos_token_id, 32)
    assert (folder / "run" / "README.md").is_file()


def test_evaluation_finds_the_losses_of_the_trainer(folder):
    arguments = ("--json", "out.json", "--prompt", "def ", "--max_new_tokens", 4, "--batch_size", 5)
    done = run(EXAMPLES / "evaluate_clm.py", "run", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    averaged, raw = json.loads((folder / "out.json").read_text())
    results = json.loads((folder / "run" / "eval_results.json").read_text())
    # Sums of the same float32 losses in batches of 5 and of 7: equal up to rounding.
    assert averaged["loss"] == pytest.approx(results["eval_loss"], abs=1e-5)
    assert raw["loss"] == pytest.approx(results["eval_raw_loss"], abs=1e-5)
    assert averaged["bits_per_byte"] == pytest.approx(results["bits_per_byte"], abs=1e-5)
    assert averaged["sample"].startswith("def ")
    assert "checkpoint-6" in raw["source"]
    assert f"{averaged['loss']:.4f}" in done.stdout and f"{raw['loss']:.4f}" in done.stdout


def test_evaluation_takes_merged_checkpoints_with_the_text_of_their_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    first, last = "run/checkpoint-3", "run/checkpoint-6"
    assert cli.main(["average", first, last, "--weights", "uniform", "-o", "merged"]) == 0
    done = run(EXAMPLES / "evaluate_clm.py", "merged", "--json", "merged.json", "--max_new_tokens", 0, cwd=folder)
    assert done.returncode == 0, done.stderr
    (column,) = json.loads((folder / "merged.json").read_text())
    model, other = (AutoModelForCausalLM.from_pretrained(name).eval() for name in (first, last))
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.add_(its).div_(2)
    blocks, _ = load_data(parse_evaluation(["merged"]), read_recipe(Path("run")), AutoTokenizer.from_pretrained("run"))
    assert column["loss"] == pytest.approx(mean_loss(model, blocks, 5, "test"), abs=1e-5)
    monkeypatch.chdir(tmp_path)  # it is remembered where the checkpoints lie, seen from what came of them
    assert read_recipe(folder / "merged") == read_recipe(folder / "run")
    shutil.copytree(folder / "merged", tmp_path / "moved")
    with pytest.raises(InputError, match=r"no run_clm.yaml in .*run/checkpoint-6, merged into .*moved or above it"):
        read_recipe(tmp_path / "moved")
    (tmp_path / "moved" / RECORD_NAME).write_text("{}")
    with pytest.raises(InputError, match=r"hf_radam_average.json cannot be read: KeyError"):
        read_recipe(tmp_path / "moved")


def test_checkpoint_holds_both_weights_for_plain_transformers(folder):
    checkpoint = folder / "run" / "checkpoint-6"
    averaged = AutoModelForCausalLM.from_pretrained(checkpoint / "ewa")
    assert same_weights(averaged, AutoModelForCausalLM.from_pretrained(folder / "run"))
    assert not same_weights(averaged, AutoModelForCausalLM.from_pretrained(checkpoint))


def test_mean_loss_weighs_an_incomplete_batch_by_its_blocks(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "run").eval()
    ids = torch.randint(0, 300, (5, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    blocks = Dataset.from_dict({"input_ids": ids.tolist()})
    assert mean_loss(model, blocks, 3, "test") == pytest.approx(expected, abs=1e-5)  # float32 against float64


def test_flags_only(folder):
    flags = (
        "--train_file texts --validation_split_percentage 20 --block_size 32 --vocab_size 300 --model_type gpt2 "
        "--config_overrides n_embd=32,n_layer=1,n_head=2 --optim radam --lr_scheduler_type wsd --max_steps 4 "
        "--save_steps 2 --output_dir flags"
    ).split()
    done = launch(*flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    flags = [*flags[: flags.index("--max_steps")], "--max_steps", "8", "--resume_from_checkpoint", "true"]
    refused = run(EXAMPLES / "run_clm.py", *flags, "--output_dir", "flags", cwd=folder)
    assert refused.returncode == 2 and "extend the run: --extend_from flags --max_steps 8" in refused.stderr
    done = launch(*flags, "--output_dir", "longer", "--extend_from", "flags", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "new: wsd, 8 steps: peak, 1-sqrt decay over steps 7-8" in done.stdout
    assert sorted(path.name for path in (folder / "longer" / "_pre_decay").iterdir()) == ["checkpoint-7"]


def test_a_run_is_not_mixed_with_the_one_in_its_folder(folder, tmp_path):
    def resume(output_dir, wanted=None, do_train=True):
        args = RAdamTrainingArguments(str(output_dir), resume_from_checkpoint=wanted, do_train=do_train)
        return checkpoint_to_resume(args)

    with pytest.raises(InputError, match="already holds checkpoint-6: pass --resume_from_checkpoint true"):
        resume(folder / "run")
    with pytest.raises(InputError, match="holds no checkpoint: leave it out"):
        resume(tmp_path, "true")
    with pytest.raises(InputError, match="nowhere is no folder"):
        resume(tmp_path, "nowhere")
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    (folder / "run" / "_pre_decay" / "checkpoint-5").mkdir(parents=True)  # no other run than that of the folder
    assert resume(folder / "run", str(folder / "run/_pre_decay/checkpoint-5")).endswith("_pre_decay/checkpoint-5")
    shutil.rmtree(folder / "run" / "_pre_decay")
    with pytest.raises(InputError, match="already holds checkpoint-6 of another run"):
        resume(folder / "run", str(tmp_path / "other" / "checkpoint-3"))
    assert resume(folder / "run", str(folder / "run" / "checkpoint-3")) == str(folder / "run" / "checkpoint-3")
    assert resume(folder / "run", "True") is True
    assert resume(tmp_path, str(folder / "run" / "checkpoint-3")) == str(folder / "run" / "checkpoint-3")
    assert resume(tmp_path) is resume(tmp_path, "false") is resume(folder / "run", do_train=False) is None


def test_what_is_refused_when_training_begins_is_one_sentence_and_changes_nothing(folder):
    run_folder = folder / "run"
    before = {path: path.read_bytes() for path in run_folder.glob("*.*")}
    late = ("--max_steps", -1, "--num_train_epochs", 1, "--optim", "radam", "--lr_scheduler_type", "wsd")
    texts = ("--train_file", "texts", "--validation_split_percentage", 20, "--block_size", 32, "--vocab_size", 300)
    for arguments, message in (
        ((*texts, *late, "--decay_steps", 5000, "--output_dir", "late"), "decay_steps=5000 need 5000 updates, but the"),
        (("run.yaml", "--resume_from_checkpoint", "true", "--learning_rate", 0.01), "trained with learning_rate=0.05"),
    ):
        done = run(EXAMPLES / "run_clm.py", *arguments, cwd=folder)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in run_folder.glob("*.*")}


def test_resuming_a_finished_run_keeps_its_metrics(folder):
    before = (folder / "run" / "train_results.json").read_bytes()
    done = run(EXAMPLES / "run_clm.py", "run.yaml", "--resume_from_checkpoint", "true", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "train_results.json").read_bytes() == before


def test_both_columns_are_of_one_checkpoint(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    assert folders(tmp_path / "run") == (tmp_path / "run", tmp_path / "run" / "checkpoint-6")
    assert folders(tmp_path / "run" / "checkpoint-3") == (tmp_path / "run" / "checkpoint-3",) * 2
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-6" / "hf_radam.json").unlink()  # killed while it was saved
    assert folders(tmp_path / "run") == (tmp_path / "run" / "checkpoint-3",) * 2


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="2 processes were launched, but each would train alone: on CPUs pass --use_cpu"
    ):
        check_processes(RAdamTrainingArguments(str(tmp_path)))


def test_two_processes_through_accelerate_launch(folder):
    options = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no")
    arguments = ("run.yaml", "--use_cpu", "true", "--output_dir", "two", "--per_device_train_batch_size", 2)
    command = ("-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no", EXAMPLES / "run_clm.py")
    done = run(*command, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "two" / "checkpoint-6" / "rng_state_1.pth").is_file()
    loss = json.loads((folder / "two" / "eval_results.json").read_text())["eval_loss"]
    # The same 4 sequences an update as with one process, with the gradient summed in another order.
    assert loss == pytest.approx(json.loads((folder / "run" / "eval_results.json").read_text())["eval_loss"], abs=1e-3)


def test_a_wrong_path_is_one_sentence_and_exit_code_2(folder):
    done = run(EXAMPLES / "evaluate_clm.py", "nowhere", cwd=folder)
    assert done.returncode == 2
    assert "nowhere is no folder" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    with pytest.raises(InputError, match="no run_clm.yaml"):
        read_recipe(folder / "texts")


def test_a_model_goes_on_from_a_run_or_takes_its_configuration(folder):
    run_folder = str(folder / "run")
    tokenizer = AutoTokenizer.from_pretrained(run_folder)

    def build(block_size=None, **fields):
        args = ModelArguments(**fields)
        named = load_named_config(args)
        return build_model(args, named, tokenizer, resolve_block_size(block_size, args, named, tokenizer))

    trained = AutoModelForCausalLM.from_pretrained(run_folder)
    assert same_weights(build(model_name_or_path=run_folder), trained)
    assert build(model_name_or_path=run_folder, dtype="bfloat16").dtype == torch.bfloat16
    new = build(
        config_name=run_folder, config_overrides="num_hidden_layers=2,max_position_embeddings=64", block_size=64
    )
    assert (new.config.num_hidden_layers, new.config.hidden_size, new.config.max_position_embeddings) == (2, 32, 64)
    for words, fields in {
        "block_size=33 is longer": {"model_name_or_path": run_folder, "block_size": 33},
        "vocab_size=299": {"config_overrides": "vocab_size=299", "block_size": 8},
        "no model can be made from LlamaConfig.*nonsense": {"attn_implementation": "nonsense", "block_size": 8},
        "no configuration can be loaded from 'nowhere'": {"config_name": "nowhere"},
    }.items():
        with pytest.raises(InputError, match=words):
            build(**fields)
