"""Command lines and YAML files of the examples: what they mean, and how wrong ones end.

Oracles: the values written down here; the exit code and the words of the error.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clm_arguments import parse_arguments
from clm_model import new_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return its path."""

    def _write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return _write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_to_what_it_says(path):
    groups = parse_arguments([str(path)])  # which makes report_to=none an empty list
    for key, value in yaml.safe_load(path.read_text()).items():
        (parsed,) = (getattr(group, key) for group in groups if hasattr(group, key))
        expected = [] if key == "report_to" else float(value) if isinstance(parsed, float) else value
        assert parsed == expected, key
    assert groups[2].output_dir == f"runs/{path.stem}"


def test_there_are_the_five_configs():
    names = {"quickstart", "radam_schedulefree", "radam_wsd", "radam_wsd_s", "radam_ewa"}
    assert {path.stem for path in CONFIGS} == names


def test_flags_win_over_yaml_and_yaml_over_defaults(write):
    path = write("learning_rate: 1e-3\nseed: 7\newa: true\noptim: radam\n")
    _, _, args = parse_arguments([path, "--seed", "8", "--ewa", "false", "--lr_scheduler_type", "wsd"])
    assert (args.learning_rate, args.seed, args.ewa, args.max_steps) == (1e-3, 8, False, -1)
    assert args.lr_scheduler_type == "wsd"


def test_yaml_values_are_read_as_flags_are(write):
    text = """
        learning_rate: 1e-3        # a string to YAML
        eval_strategy: no          # false to YAML
        bf16: off
        seed: null
        run_name: 2024-01-01       # a date to YAML
        lr_scheduler_type: wsd_s
        budgets: [0.25, 50]
        max_steps: 100
        accelerator_config: {split_batches: true}
        liger_kernel_config: {rope: true}
    """
    _, _, args = parse_arguments([write("\n".join(line.strip() for line in text.splitlines()))])
    assert (args.learning_rate, args.eval_strategy, args.bf16, args.seed) == (1e-3, "no", False, 42)
    assert (args.run_name, args.budgets) == ("2024-01-01", [0.25, 50.0])
    assert args.accelerator_config.split_batches is True
    assert args.liger_kernel_config == {"rope": True}


def test_a_json_file_means_what_the_same_yaml_does(tmp_path):
    settings = {"learning_rate": 1e-7, "budgets": [0.25, 60], "lr_scheduler_type": "wsd_s", "max_steps": 100}
    settings |= {"ewa": True, "seed": None, "run_name": "tab\there \U0001f600", "block_size": 32}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings, indent="\t"), encoding="utf-8")  # which escapes the emoji as a pair
    _, data, args = parse_arguments([str(path), "--max_steps", "200"])
    assert (args.learning_rate, args.budgets, args.ewa, args.seed) == (1e-7, [0.25, 60.0], True, 42)
    assert (args.run_name, args.max_steps, data.block_size) == ("tab\there \U0001f600", 200, 32)
    path.write_text('{"seed": 1, "seed": 2}', encoding="utf-8")
    with pytest.raises(SystemExit):
        parse_arguments([str(path)])


def test_json_that_is_yaml_alone_is_refused(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text("seed: 1", encoding="utf-8")
    _assert_refused([str(path)], ["run.json: is not valid JSON"], capsys)


def test_neither_do_train_nor_do_eval_means_both(write):
    def done(*argv):
        args = parse_arguments(argv)[2]
        return args.do_train, args.do_eval

    assert done() == done("--eval_strategy", "epoch") == done(write("seed: 1")) == (True, True)
    assert done("--do_train") == (True, False)
    assert done("--do_eval", "--model_name_or_path", "gpt2") == (False, True)
    assert done("--do_train", "--eval_strategy", "epoch") == (True, True)  # as upstream


WRONG = {
    "unknown flag": (["--learning_rat", "1"], ["unknown flag --learning_rat", "did you mean --learning_rate"]),
    "abbreviation": (["--max_step", "5"], ["unknown flag --max_step", "--max_steps"]),
    "word": (["--seed", "1", "extra"], ["'extra'", "a YAML file comes first"]),
    "type": (["--max_steps", "many"], ["--max_steps", "'many'"]),
    "choice": (["--eval_strategy", "sometimes"], ["'sometimes'", "epoch"]),
    "schedule": (["--lr_scheduler_type", "wds"], ["wds", "wsd"]),
    "combination": (["--optim", "radam_schedulefree", "--lr_scheduler_type", "wsd"], ["wsd", "constant"]),
    "NaN": (["--optim", "radam", "--learning_rate", "nan"], ["learning_rate", "nan"]),
    "zero block": (["--block_size", "0"], ["block_size=0", "positive"]),
    "split": (["--validation_split_percentage", "100"], ["validation_split_percentage=100", "1 to 99"]),
    "no file": (["--train_file", "missing.txt"], ["train_file=missing.txt does not exist", "give a file"]),
    "suffix": (["--train_file", __file__], ["'.py'", ".jsonl"]),
    "two sources": (["--dataset_name", "x", "--train_file", "."], ["dataset_name=x", "train_file=.", "leave one out"]),
    "half a source": (["--validation_file", "."], ["validation_file=.", "needs train_file"]),
    "stream": (["--streaming", "--train_file", "."], ["streaming needs max_steps", "-1"]),
    "new and old": (["--model_name_or_path", "x", "--model_type", "llama"], ["model_type=llama", "leave one"]),
    "architecture": (["--model_type", "lama"], ["model_type=lama", "llama"]),
    "override": (["--config_overrides", "hidden_sise=1"], ["'hidden_sise'", "did you mean hidden_size"]),
    "override pair": (["--config_overrides", "hidden_size"], ["'hidden_size' has no `=`", "name=value"]),
    "override type": (["--config_overrides", "hidden_size=big"], ["hidden_size=big", "int"]),
    "heads": (["--config_overrides", "num_attention_heads=3"], ["hidden size", "256"]),
    "vocabulary": (["--vocab_size", "100"], ["vocab_size=100", "257"]),
    "tokenizer": (["--vocab_size", "300", "--tokenizer_name", "x"], ["vocab_size=300", "leave it out"]),
    "nothing": (
        ["--do_train", "false", "--do_eval", "false", "--model_name_or_path", "gpt2"],
        ["do_train", "nothing is left"],
    ),
    "untrained": (["--do_train", "false", "--do_eval"], ["do_train=false", "would evaluate an untrained model"]),
    "JSON missing": (["missing.json"], ["missing.json", "No such file"]),
    "yaml missing": (["missing.yaml"], ["missing.yaml", "No such file"]),
    "no yaml": (["data.csv"], ["'data.csv'", ".yaml"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(name, capsys):
    argv, words = WRONG[name]
    _assert_refused(argv, words, capsys)


WRONG_YAML = {
    "unknown key": ("learning_rat: 1", ["'learning_rat'", "did you mean learning_rate"]),
    "type": ("max_steps: many", ["--max_steps", "'many'"]),
    "float for int": ("max_steps: 1e3", ["--max_steps", "'1e3'"]),
    "boolean": ("max_steps: true", ["--max_steps", "'true'"]),
    "list": ("max_steps: [1, 2]", ["max_steps takes one value", "[1, 2]"]),
    "mapping": ("ewa: {a: 1}", ["ewa takes one value", "{'a': 1}"]),
    "empty list": ("budgets: []", ["budgets is an empty list"]),
    "twice": ("seed: 1\nseed: 2", ["'seed' stands there 2 times"]),
    "not a mapping": ("- seed", ["holds no settings"]),
    "empty": ("", ["holds no settings"]),
    "not YAML": ("seed: [1", ["is not valid YAML"]),
    "code": ("run_name: !!python/name:os.system", ["is not valid YAML"]),
}


@pytest.mark.parametrize("name", WRONG_YAML)
def test_a_wrong_yaml_file_is_one_sentence_and_exit_code_2(name, write, capsys):
    text, words = WRONG_YAML[name]
    _assert_refused([write(text)], ["run.yaml: ", *words], capsys)


def _assert_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1
    assert not [word for word in words if word not in message], message


def test_the_script_itself_ends_with_exit_code_2():
    command = [sys.executable, ROOT / "examples" / "run_clm.py", "--ewa_decay", "0.9"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("run_clm.py: error: ewa_decay=0.9")
    assert done.stderr.count("\n") == 1


def test_overrides_reach_what_the_constructor_derives():
    config = new_config("llama", "hidden_size=128,num_attention_heads=8,tie_word_embeddings=true", {})
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (16, 8, True)
    assert new_config("gpt2", "hidden_size=64,n_head=4", {"max_position_embeddings": 32}).n_positions == 32
