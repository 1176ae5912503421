"""The README's first run: its commands as they stand, in their order, print the lines that it shows.

Only the configuration is smaller, and the text. Numbers with decimals that come out of a training are not compared.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text("utf-8").split("## A first run, step by step")[1].split("\n## ")[0]
SMALLER = {
    "train_file": "texts",
    "validation_split_percentage": 20,
    "block_size": 32,
    "vocab_size": 300,
    "config_overrides": "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,"
    "num_key_value_heads=2",
    "per_device_train_batch_size": 2,
}
MEASURED = ("loss", "perplexity", "bits per byte", "first  ")
"""Beginnings of lines that have numbers of the training."""


def commands() -> list[str]:
    block = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1]
    return block.splitlines()


def samples() -> dict[str, list[str]]:
    """The lines that are shown of each command."""
    block = re.search(r"```text\n(.*?)```", SECTION, re.DOTALL)[1]
    found = {}
    for part in block.split("$ ")[1:]:
        command, *lines = part.splitlines()
        found[command] = [line for line in lines if line.strip(" .")]
    return found


def comparable(line: str) -> str:
    """A line without the numbers of a training and without alignment."""
    if line.startswith(MEASURED):
        line = re.sub(r"\d+\.\d+", "#", line)
    return " ".join(line.split())


def test_every_command_does_what_it_shows(tmp_path):
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for i in range(20):
        text = " ".join(draw.choices("def return class import self value name list text number".split(), k=200))
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text("utf-8"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config | SMALLER))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),  # no launch settings of this machine
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "80",
        "PYTHONUTF8": "1",
    }
    shown = samples()
    assert len(commands()) == 8 and shown.keys() <= set(commands()) and len(shown) == 6 and all(shown.values())
    for command in commands():
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        output = [comparable(line) for line in (done.stdout + done.stderr).splitlines()]
        missing = [line for line in shown.get(command, []) if comparable(line) not in output]
        assert missing == [], f"{command}\n{done.stdout}"
    assert (tmp_path / "first.png").stat().st_size > 10_000
    evaluated = [line for line in output if line.startswith("loss")]
    assert len(evaluated) == 1
