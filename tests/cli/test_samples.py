"""The samples of output in the README, and the commands of `docs/tools.md`, are what the commands say.

Oracle: the commands themselves, on real runs.
"""

import re
import shlex
from pathlib import Path

import tiny

from hf_radam import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
SECTION = README.split("## Look at a schedule, at runs, and merge checkpoints")[1].split("\n## ")[0]
SAMPLES = re.findall(r"<!-- sample: tests/cli.*?```text\n(.*?)```", SECTION, re.DOTALL)


def command(name):
    """The words of the section's command."""
    (line,) = re.findall(rf"^hf-radam ({name} .*)$", SECTION, re.MULTILINE)
    return shlex.split(line)


def missing(sample, output):
    assert len(sample.splitlines()) > 3
    return [line for line in sample.splitlines() if line not in output.splitlines()]


def test_the_schedule(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(command("schedule")) == 0
    assert missing(SAMPLES[0], capsys.readouterr().out) == []


def test_the_merge_and_the_plot(tmp_path, capsys, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 6, "logging_strategy": "steps", "logging_steps": 5}
    monkeypatch.chdir(tmp_path)
    tiny.trainer(Path("runs/constant"), optim="radam", lr_scheduler_type="constant", **options).train()
    tiny.trainer(Path("runs/wsd"), optim="radam", **options).train()
    capsys.readouterr()
    words = [str(p) for p in sorted(Path("runs/constant").glob("checkpoint-*"))]
    at = command("average").index("runs/constant/checkpoint-*")
    assert cli.main([*command("average")[:at], *words, *command("average")[at + 1 :]]) == 0
    assert missing(SAMPLES[1], capsys.readouterr().out) == []
    assert cli.main(command("plot")) == 0
    assert Path("losses.png").is_file()
