"""The help of every command, and the examples in it, which are run.

Oracle: exit codes, and the files that the examples say they make.
"""

import glob
import re
import shlex
from pathlib import Path

import pytest
import tiny

from hf_radam import cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("inspect", "schedule", "plot", "average", "consolidate")


def help_of(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def examples(command):
    """The command lines at the end of a command's help."""
    parser = cli.parser()
    (commands,) = (action for action in parser._actions if action.choices)
    return re.findall(r"^  (hf-radam .*)$", commands.choices[command].epilog, re.MULTILINE)


def test_the_help_names_every_command(capsys):
    text = help_of([], capsys)
    (names,) = (action.choices for action in cli.parser()._actions if action.choices)
    assert set(names) == set(COMMANDS)
    assert all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_ends_in_examples(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = help_of([command], capsys)
    assert text.startswith(f"usage: hf-radam {command}")
    told = text.split("examples:\n")[1].splitlines()
    assert [line.strip() for line in told] == examples(command) and len(told) >= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the runs and configs that the examples speak of."""
    root = tmp_path_factory.mktemp("examples")
    (root / "configs").symlink_to(ROOT / "configs")
    options = {"save_strategy": "steps", "save_steps": 6, "logging_strategy": "steps", "logging_steps": 5}
    wsd = tiny.trainer(root / "runs/wsd", optim="radam", lr_scheduler_type="wsd", decay_steps=8, **options)
    wsd.train()
    wsd.save_model()
    tiny.trainer(root / "runs/constant", optim="radam", lr_scheduler_type="constant", **options).train()
    return root


@pytest.mark.parametrize("line", [line for command in COMMANDS for line in examples(command)])
def test_the_examples_run(folder, line, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = [sorted(glob.glob(word)) or [word] for word in shlex.split(line)]  # as the shell does
    assert cli.main([word for found in words for word in found][1:]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for made in re.findall(r"(?:-o|--png) (\S+)", line):
        assert Path(made).exists() and made in output.out


def test_words_too_many_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "runs/wsd", "--jsn"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "hf-radam inspect: error: unrecognized arguments: --jsn"
