"""The scripts from end to end: `run_clm.py` trains a tiny model, `evaluate_clm.py` finds its loss again.

They run in this process; test_launching.py and test_first_run.py launch them. Oracles: `eval_results.json`, which
the trainer wrote; the loss of the folder `ewa/` loaded by plain transformers.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launched import SETTINGS, write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_clm
import run_clm
from clm_arguments import ModelArguments
from clm_model import InputError, build_model, load_named_config, resolve_block_size
from evaluate_clm import folders, load_data, mean_loss, read_recipe, same_weights
from hf_radam import RAdamTrainingArguments, cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run of six steps: RAdam and EWA, checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("run_clm")
    write_texts(folder / "texts")
    settings = SETTINGS | {
        "validation_split_percentage": 20,
        "cache_dir": "cache",
        "use_cpu": True,
        "learning_rate": 0.05,  # large, so that averaged and training weights differ
        "max_steps": 6,
        "save_steps": 3,
        "max_eval_samples": 16,
        "per_device_eval_batch_size": 7,  # leaves an incomplete last batch
        "output_dir": "run",
        "token": "secret",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["run_clm.py", "run.yaml", "--ewa_eval_raw"])
        run_clm.run()
    return folder


@pytest.fixture
def script(folder, monkeypatch, capsys):
    """Run a script in the folder, in this process; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def _script(function, *arguments):
        monkeypatch.setattr("sys.argv", [function.__module__ + ".py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            function()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return _script


def test_run_leaves_model_metrics_and_recipe(folder):
    results = json.loads((folder / "run" / "eval_results.json").read_text())
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-5)
    assert results["eval_raw_loss"] != results["eval_loss"]
    recipe = read_recipe(folder / "run" / "checkpoint-3")
    assert recipe["data"]["block_size"] == 16
    assert "secret" not in (folder / "run" / "run_clm.yaml").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")
    model = AutoModelForCausalLM.from_pretrained(folder / "run")
    config = model.config
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 16) == (300, 16)
    assert config.eos_token_id == tokenizer.eos_token_id and (folder / "run" / "README.md").is_file()
    averaged = AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoint-6" / "ewa")
    assert same_weights(averaged, model)
    assert not same_weights(averaged, AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoint-6"))


def test_evaluation_finds_the_losses_of_the_trainer(folder, script):
    arguments = ("--json", "out.json", "--prompt", "def ", "--max_new_tokens", 4, "--batch_size", 5)
    code, said, _ = script(evaluate_clm.main, "run", *arguments)
    assert code == 0
    averaged, raw = json.loads((folder / "out.json").read_text())
    results = json.loads((folder / "run" / "eval_results.json").read_text())
    # Sums of the same float32 losses in batches of 5 and of 7: equal up to rounding.
    assert averaged["loss"] == pytest.approx(results["eval_loss"], abs=1e-5)
    assert raw["loss"] == pytest.approx(results["eval_raw_loss"], abs=1e-5)
    assert averaged["bits_per_byte"] == pytest.approx(results["bits_per_byte"], abs=1e-5)
    assert averaged["sample"].startswith("def ") and "checkpoint-6" in raw["source"]
    assert f"{averaged['loss']:.4f}" in said and f"{raw['loss']:.4f}" in said
    code, _, said = script(evaluate_clm.main, "nowhere")
    assert code == 2 and said.startswith("evaluate_clm.py: error: nowhere is not a folder. Give the folder of ")
    with pytest.raises(InputError, match="There is no run_clm.yaml in"):
        read_recipe(folder / "texts")


def test_evaluation_takes_merged_checkpoints_with_the_text_of_their_run(folder, script, tmp_path, monkeypatch):
    first, last = "run/checkpoint-3", "run/checkpoint-6"
    assert cli.main(["average", first, last, "--weights", "uniform", "-o", "merged"]) == 0
    assert script(evaluate_clm.main, "merged", "--json", "merged.json", "--max_new_tokens", 0)[0] == 0
    (column,) = json.loads((folder / "merged.json").read_text())
    model, other = (AutoModelForCausalLM.from_pretrained(name).eval() for name in (first, last))
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.add_(its).div_(2)
    arguments, tokenizer = evaluate_clm.parse_arguments(["merged"]), AutoTokenizer.from_pretrained("run")
    blocks, _ = load_data(arguments, read_recipe(Path("run")), tokenizer)
    assert column["loss"] == pytest.approx(mean_loss(model, blocks, 5, "test"), abs=1e-5)
    monkeypatch.chdir(tmp_path)  # the record has the places of the checkpoints relative to itself
    assert read_recipe(folder / "merged") == read_recipe(folder / "run")


def test_a_run_is_not_mixed_with_the_one_in_its_folder(folder, tmp_path):
    def resume(output_dir, wanted=None, do_train=True):
        args = RAdamTrainingArguments(str(output_dir), resume_from_checkpoint=wanted, do_train=do_train, use_cpu=True)
        return run_clm.checkpoint_to_resume(args)

    run = folder / "run"
    other = tmp_path / "other" / "checkpoint-3"
    other.mkdir(parents=True)
    for request, message in (
        ((run,), "already holds checkpoint-6. Give --resume_from_checkpoint true"),
        ((tmp_path, "true"), "holds no checkpoint. Leave it out"),
        ((tmp_path, "nowhere"), "nowhere is not a folder"),
        ((run, str(other)), "already holds checkpoint-6 of another run"),
    ):
        with pytest.raises(InputError, match=message):
            resume(*request)
    assert resume(run, str(run / "checkpoint-3")) == str(run / "checkpoint-3")
    assert resume(run, "True") is True
    assert resume(tmp_path, str(run / "checkpoint-3")) == str(run / "checkpoint-3")
    assert resume(tmp_path) is resume(tmp_path, "false") is resume(run, do_train=False) is None


def test_what_the_trainer_refuses_changes_nothing_and_a_finished_run_keeps_its_metrics(folder, script, monkeypatch):
    before = {path: path.read_bytes() for path in (folder / "run").glob("*.*")}
    late = "run.yaml --max_steps -1 --num_train_epochs 1 --lr_scheduler_type wsd --decay_steps 5000 --output_dir late"
    resume = ("run.yaml", "--resume_from_checkpoint", "true")
    for arguments, message in (
        (late.split(), "Warm-up and decay (0 + 5000 steps) do not fit"),
        ((*resume, "--learning_rate", 0.01), "trained with learning_rate=0.05"),
    ):
        code, _, said = script(run_clm.run, *arguments)
        assert code == 2 and said.splitlines()[-1].startswith("run_clm.py: error: ") and message in said
    assert before == {path: path.read_bytes() for path in (folder / "run").glob("*.*")}
    assert script(run_clm.run, *resume)[0] == 0
    assert before[folder / "run/train_results.json"] == (folder / "run" / "train_results.json").read_bytes()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # and nothing was launched
    code, _, said = script(run_clm.run, "run.yaml", "--output_dir", "fsdp")
    assert code == 2 and said.splitlines()[-1].startswith("run_clm.py: error: FSDP was asked for, but ")


def test_both_columns_are_of_one_checkpoint(folder, tmp_path):
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    assert folders(run) == (run, run / "checkpoint-6")
    assert folders(run / "checkpoint-3") == (run / "checkpoint-3",) * 2
    (run / "model.safetensors").unlink()
    (run / "checkpoint-6" / "hf_radam.json").unlink()  # killed while it was saved
    assert folders(run) == (run / "checkpoint-3",) * 2


def test_a_model_is_continued_or_gives_its_configuration(folder):
    run = str(folder / "run")
    tokenizer = AutoTokenizer.from_pretrained(run)

    def build(block_size=None, **fields):
        args = ModelArguments(**fields)
        named = load_named_config(args)
        return build_model(args, named, tokenizer, resolve_block_size(block_size, args, named, tokenizer))

    assert same_weights(build(model_name_or_path=run), AutoModelForCausalLM.from_pretrained(run))
    assert build(model_name_or_path=run, dtype="bfloat16").dtype == torch.bfloat16
    new = build(config_name=run, config_overrides="num_hidden_layers=1,max_position_embeddings=64", block_size=64)
    assert (new.config.num_hidden_layers, new.config.hidden_size, new.config.max_position_embeddings) == (1, 32, 64)
    for message, fields in {
        "block_size=17 is longer": {"model_name_or_path": run, "block_size": 17},
        "vocab_size=299": {"config_overrides": "vocab_size=299", "block_size": 8},
        "No configuration can be loaded from 'nowhere'": {"config_name": "nowhere"},
    }.items():
        with pytest.raises(InputError, match=message):
            build(**fields)
