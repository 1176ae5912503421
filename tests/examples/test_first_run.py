"""The guide's first run: its commands as they stand, in their order, print the lines that it shows.

Only the configuration is smaller, and the text. Numbers with decimals that come out of a training are not compared.
"""

import os
import random
import re
import sys
from pathlib import Path

import limits
import yaml

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "guide.md").read_text("utf-8").split("## 1. A first run")[1].split("\n## ")[0]
SMALLER = {"train_file": "texts", "validation_split_percentage": 20, "block_size": 32, "vocab_size": 300}
SMALLER |= {"per_device_train_batch_size": 2, "config_overrides": "hidden_size=16,intermediate_size=32"}
SMALLER["config_overrides"] += ",num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
MEASURED = ("loss", "perplexity", "bits per byte", "first  ")  # beginnings of lines with numbers of the training


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
        "HF_HOME": str(tmp_path / "home"),  # no launch settings of this machine
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "80",
        "PYTHONUTF8": "1",
    }
    commands = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()
    samples = [part.splitlines() for part in re.search(r"```text\n(.*?)```", SECTION, re.DOTALL)[1].split("$ ")[1:]]
    shown = {command: [line for line in lines if line.strip(" .")] for command, *lines in samples}
    assert shown.keys() <= set(commands) and all(shown.values())
    for command in commands:
        done = limits.run(["bash", "-c", command], cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        output = [comparable(line) for line in (done.stdout + done.stderr).splitlines()]
        missing = [line for line in shown.get(command, []) if comparable(line) not in output]
        assert missing == [], f"{command}\n{done.stdout}"
    assert (tmp_path / "first.png").stat().st_size > 10_000
