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

from hf_radam import cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("inspect", "schedule", "plot", "average", "consolidate")


def examples(command):
    """The command lines at the end of a command's help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    return [line.strip() for line in output.getvalue().split("examples:\n")[1].splitlines()]


def test_the_help_names_every_command_and_imports_none():
    code = (
        "import contextlib, sys\nfrom hf_radam.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "sys.exit(str({'hf_radam.cli.inspect', 'hf_radam.cli.plot', 'torch'} & set(sys.modules) or '') or 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert all(re.search(rf"^    {name}\s", done.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.fixture(scope="module")
def folder(made, checkpoints, tmp_path_factory):
    """A folder with the runs and configs that the examples speak of."""
    root = tmp_path_factory.mktemp("examples")
    (root / "runs").mkdir()
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "runs/wsd").symlink_to(made / "wsd")
    (root / "runs/constant").symlink_to(checkpoints[0].parent)
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_ends_in_examples_that_run(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = examples(command)
    monkeypatch.setenv("COLUMNS", "200")
    assert len(narrow) >= 2 and narrow == examples(command)
    for line in narrow:
        assert line.startswith(f"hf-radam {command} ")
        words = [sorted(glob.glob(word)) or [word] for word in shlex.split(line)]  # as the shell does
        assert cli.main([word for found in words for word in found][1:]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        for made in re.findall(r"(?:-o|--png) (\S+)", line):
            assert Path(made).exists() and made in output.out
