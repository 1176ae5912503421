"""Command lines and YAML files of the examples: what they mean, and how wrong ones end.

Oracles: the values written down here; the exit code and the words of the error.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from clm_arguments import DataArguments, parse_arguments
from clm_model import InputError, new_config
from run_clm import check_processes

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Write a configuration file and return its path."""

    def _write(text):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return _write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_to_what_it_says(path):
    assert len(CONFIGS) == 5
    groups = parse_arguments([str(path)])  # which makes report_to=none an empty list
    for key, value in yaml.safe_load(path.read_text()).items():
        (parsed,) = (getattr(group, key) for group in groups if hasattr(group, key))
        expected = [] if key == "report_to" else float(value) if isinstance(parsed, float) else value
        assert parsed == expected, key
    assert groups[2].output_dir == f"runs/{path.stem}"


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
    _, _, args = parse_arguments([write(text)])
    assert (args.learning_rate, args.eval_strategy, args.bf16, args.seed) == (1e-3, "no", False, 42)
    assert (args.run_name, args.budgets) == ("2024-01-01", [0.25, 50.0])
    assert args.accelerator_config.split_batches is True
    assert args.liger_kernel_config == {"rope": True}


def test_a_json_file_means_what_the_same_yaml_does(tmp_path, capsys):
    settings = {"learning_rate": 1e-7, "budgets": [0.25, 60], "lr_scheduler_type": "wsd_s", "max_steps": 100}
    settings |= {"seed": None, "run_name": "tab\there \U0001f600"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings, indent="\t"), encoding="utf-8")  # which escapes the emoji as a pair
    _, _, args = parse_arguments([str(path), "--max_steps", "200"])
    assert (args.learning_rate, args.budgets, args.seed, args.max_steps) == (1e-7, [0.25, 60.0], 42, 200)
    assert args.run_name == "tab\there \U0001f600"
    for text, argv in (('{"a": 1, "seed": {"a": 1}, "a": 2}', []), ('{"budgets": [0.25, 60]}', ["700"])):
        path.write_text(text)
        with pytest.raises(SystemExit):
            parse_arguments([str(path), *argv])
    said = capsys.readouterr().err
    assert "run.json: key 'a' is given 2 times" in said and "unexpected argument '700'" in said


def test_neither_do_train_nor_do_eval_means_both(write):
    def done(*argv):
        args = parse_arguments(argv)[2]
        return args.do_train, args.do_eval

    assert done() == done("--eval_strategy", "epoch") == done(write("seed: 1")) == (True, True)
    assert done("--do_train") == (True, False)
    assert done("--do_eval", "--model_name_or_path", "gpt2") == (False, True)
    assert done("--do_train", "--eval_strategy", "epoch") == (True, True)  # as upstream


WRONG = {
    "--learning_rat 1": ["unknown flag --learning_rat", "did you mean --learning_rate"],
    "--max_step 5": ["unknown flag --max_step", "--max_steps"],
    "--seed 1 extra": ["'extra'", "a YAML file comes first"],
    "--optim radam_schedulefree --lr_scheduler_type wsd": ["wsd", "constant"],
    "--vocab_size 100": ["vocab_size=100", "257"],
    "--validation_split_percentage 100": ["validation_split_percentage=100", "1 to 99"],
    "--train_file missing.txt": ["train_file=missing.txt does not exist", "Give a file"],
    f"--train_file {__file__}": ["'.py'", ".jsonl"],
    "--dataset_name x --train_file .": ["dataset_name=x", "train_file=.", "Leave one out"],
    "--validation_file .": ["validation_file=.", "Give train_file"],
    "--streaming --train_file .": ["max_steps=-1", "A stream has no length"],
    "--model_name_or_path x --model_type llama": ["model_type=llama", "Leave one out"],
    "--model_type lama": ["model_type=lama", "llama"],
    "--config_overrides hidden_sise=1": ["'hidden_sise'", "did you mean hidden_size"],
    "--config_overrides hidden_size=big": ["hidden_size=big", "int"],
    "--config_overrides num_attention_heads=3": ["hidden size", "256"],
    "--vocab_size 300 --tokenizer_name x": ["vocab_size=300", "Leave it out"],
    "--do_train false --do_eval false --model_name_or_path gpt2": ["do_train", "nothing is left"],
    "--do_train false --do_eval": ["do_train=false", "would evaluate an untrained model"],
    "missing.yaml": ["missing.yaml", "No such file"],
    "data.csv": ["'data.csv'", ".yaml"],
}
WRONG_YAML = {
    "learning_rat: 1": ["'learning_rat'", "did you mean learning_rate"],
    "max_steps: true": ["--max_steps", "'true'"],
    "max_steps: [1, 2]": ["max_steps takes one value", "[1, 2]"],
    "budgets: []": ["budgets is an empty list"],
    "seed: 1\nseed: 2": ["'seed'", "2 times"],
    "seed: [1": ["is not valid YAML"],
    "run_name: !!python/name:os.system": ["is not valid YAML"],
}


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_YAML])
def test_a_wrong_request_is_one_sentence_and_exit_code_2(wrong, write, capsys):
    words = WRONG.get(wrong) or ["run.yaml: ", *WRONG_YAML[wrong]]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(wrong.split(" ") if wrong in WRONG else [write(wrong)])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("\n")) == (2, 1)
    assert not [word for word in words if word not in message], message


def test_processes_that_would_not_train_together_are_refused(monkeypatch, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    stream = DataArguments(streaming=True, train_file=str(tmp_path / "a.jsonl"))
    apart = SimpleNamespace(dispatch_batches=False)
    check_processes(stream, SimpleNamespace(world_size=1, accelerator_config=apart))
    check_processes(stream, SimpleNamespace(world_size=2, accelerator_config=SimpleNamespace(dispatch_batches=None)))
    check_processes(DataArguments(), SimpleNamespace(world_size=2, accelerator_config=apart))
    with pytest.raises(InputError, match="dispatch_batches=false does not split a stream evenly"):
        check_processes(stream, SimpleNamespace(world_size=2, accelerator_config=apart))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched, but each would train alone"):
        check_processes(DataArguments(), SimpleNamespace(world_size=1))


def test_overrides_reach_what_the_constructor_derives():
    config = new_config("llama", "hidden_size=128,num_attention_heads=8,tie_word_embeddings=true", {})
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (16, 8, True)
    assert new_config("gpt2", "hidden_size=64,n_head=4", {"max_position_embeddings": 32}).n_positions == 32
