"""The guide's first run: its commands as they stand, in their order, print the lines that it shows.

The first training is launched as it stands, and the other commands run in this process. Only the configuration is
smaller, and the text. Numbers with decimals that come out of a training are not compared.
"""

import glob
import os
import re
import shlex
import sys
from pathlib import Path

import limits
import yaml
from launched import ROOT, SETTINGS, write_texts

import evaluate_clm
import run_clm
from hf_radam import cli

SECTION = (ROOT / "docs" / "guide.md").read_text("utf-8").split("## 1. A first run")[1].split("\n## ")[0]
SMALLER = SETTINGS | {"validation_split_percentage": 20, "use_cpu": True, "cache_dir": "cache"}
MEASURED = ("loss", "perplexity", "bits per byte", "runs/first ")  # beginnings of lines with numbers of the training


def comparable(line: str) -> str:
    """A line without the numbers of a training and without alignment."""
    if line.startswith(MEASURED):
        line = re.sub(r"\d+\.\d+", "#", line)
    return " ".join(line.split())


def carry_out(command: str, monkeypatch) -> str:
    """Carry out a command: launch the first training, and do the rest in this process; return what a launch printed."""
    program, *words = [word for pattern in shlex.split(command) for word in sorted(glob.glob(pattern)) or [pattern]]
    if program == "hf-radam":
        assert cli.main(words) == 0
    elif program == "accelerate" and not Path("runs").exists():
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        home = str(Path("home").absolute())  # no launch settings of this machine
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HOME": home}
        done = limits.run(["bash", "-c", command], env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    else:
        script = "examples/run_clm.py" if program == "accelerate" else "examples/evaluate_clm.py"
        monkeypatch.setattr("sys.argv", words[words.index(script) :])
        (run_clm.run if program == "accelerate" else evaluate_clm.main)()
    return ""


def test_every_command_does_what_it_shows(tmp_path, monkeypatch, capsys):
    write_texts(tmp_path / "texts")
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text("utf-8"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config | SMALLER))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    commands = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
    samples = [part.splitlines() for part in re.search(r"```text\n(.*?)```", SECTION, re.DOTALL)[1].split("$ ")[1:]]
    shown = {command: [line for line in lines if line.strip(" .")] for command, *lines in samples}
    assert shown.keys() <= set(commands) and all(shown.values())
    for command in commands:
        printed = carry_out(command, monkeypatch) + "".join(capsys.readouterr())
        output = [comparable(line) for line in printed.splitlines()]
        missing = [line for line in shown.get(command, []) if comparable(line) not in output]
        assert missing == [], f"{command}\n{printed}"
    assert (tmp_path / "first.png").stat().st_size > 10_000
