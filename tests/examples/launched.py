"""What the tests of the examples share: random text, a tiny llama, and `accelerate launch`."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import limits
import pytest

ROOT = Path(__file__).parents[2]
SHAPE = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=2"
SETTINGS = {"optim": "radam", "ewa": True, "train_file": "texts", "block_size": 16, "per_device_train_batch_size": 4}
SETTINGS |= {"config_overrides": SHAPE, "vocab_size": 300, "report_to": "none"}


def random_text(draw, words):
    return " ".join(draw.choices("def return class import self value name list text number".split(), k=words))


def write_texts(folder, count=20, words=(200, 200)):
    """Write text files of so many words, at least and at most, into a new folder."""
    draw = random.Random(0)
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02}.txt").write_text(random_text(draw, draw.randint(*words)))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launch:
    """`accelerate launch` of a script with a file of `configs/accelerate/`, on CPUs."""

    def __init__(self, file, script, *words, cwd, options=(), port=None, **environment):
        config = ROOT / "configs" / "accelerate" / f"{file}.yaml"
        command = ["-m", "accelerate.commands.launch", "--config_file", config]
        command += ["--main_process_port", port or free_port(), *options, script, *words]
        settings = {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(cwd / "home"),
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=os.environ | settings | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self):
        """Wait for the end, or end all of its processes if they hang; return what they printed."""
        try:
            text = "\n".join(limits.communicate(self.process))
        except subprocess.TimeoutExpired as error:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"the launch hangs:\n{error.stdout}\n{error.stderr}"[-3000:])
        assert self.process.returncode == 0, text[-5000:]
        return text
