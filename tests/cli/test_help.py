"""The help of every command, and the examples in it, which are run.

Oracle: exit codes, and the files that the examples say they make.
"""

import contextlib
import glob
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hf_radam import cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("inspect", "schedule", "plot", "average", "consolidate")


def help_of(*words):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    return output.getvalue()


def examples(command):
    """The command lines at the end of a command's help."""
    return [line.strip() for line in help_of(command).split("examples:\n")[1].splitlines()]


def test_the_help_names_every_command_and_imports_none():
    text = help_of()
    assert all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in COMMANDS)
    code = (
        "import contextlib, sys\nfrom hf_radam.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "sys.exit(str({'hf_radam.cli.inspect', 'hf_radam.cli.plot', 'torch'} & set(sys.modules) or '') or 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_ends_in_examples(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert help_of(command).startswith(f"usage: hf-radam {command}")
    assert len(examples(command)) >= 2 and all(line.startswith(f"hf-radam {command} ") for line in examples(command))


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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_run(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for line in examples(command):
        words = [sorted(glob.glob(word)) or [word] for word in shlex.split(line)]  # as the shell does
        assert cli.main([word for found in words for word in found][1:]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        for made in re.findall(r"(?:-o|--png) (\S+)", line):
            assert Path(made).exists() and made in output.out


def test_wrong_arguments_are_refused(capsys):
    for words, line in {
        ("inspect", "runs/wsd", "--jsn"): "hf-radam inspect: error: unrecognized arguments: --jsn",
        ("nothing",): "hf-radam: error: argument COMMAND: invalid choice: 'nothing' (choose from ",
        (): "hf-radam: error: the following arguments are required: COMMAND",
    }.items():
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(line)
