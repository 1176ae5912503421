"""Commands that a signal ends: one line, the exit code of shells, nothing left.

Oracle: the folder as it was, and a process of its own that is really sent a signal while it writes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import limits
import pytest
import torch

from hf_radam import cli
from hf_radam.checkpoints.weights import Tensors, write_weights
from hf_radam.cli.merging import Source

ROOT = Path(__file__).parents[2]
ROWS = 2**19  # 8 tensors of 8 MB in a checkpoint: time to be stopped in


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two checkpoints of a model without a class."""
    folders = [tmp_path_factory.mktemp("large") / f"checkpoint-{number}" for number in (1, 2)]
    like = {f"{number:02d}": torch.empty(ROWS, 4, device="meta") for number in range(8)}
    for number, folder in enumerate(folders, 1):
        folder.mkdir()
        state = {"global_step": number, "log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
        tensors = Tensors(like, lambda key, number=number: torch.full((ROWS, 4), float(number)))
        write_weights(folder, None, tensors, writes=True)
    return folders


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_merge_that_is_stopped_leaves_nothing(large, tmp_path, number):
    words = ["average", *map(str, large), "--weights", "uniform", "--max_file_size", "9MB", "-o", str(tmp_path / "m")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "hf_radam.cli", *words]
    process = subprocess.Popen(
        call,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background job is begun to ignore SIGINT
    )
    limits.wait_until(lambda: any(tmp_path.glob(".averaging-*/model/*.safetensors")), process)
    process.send_signal(number)
    process.send_signal(number)  # somebody in a hurry
    output, errors = limits.communicate(process)
    assert (process.returncode, output) == (128 + number, "")
    assert errors == f"hf-radam average: ended by {number.name}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, KeyboardInterrupt])
def test_an_error_that_a_signal_has_become_is_not_printed(checkpoints, tmp_path, capsys, monkeypatch, error):
    """Rust and C that call Python may make any error of what a signal raises there: so this one is made here."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def read(self, key):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise error("could not determine the shape of object type") from None

    monkeypatch.setattr(Source, "read", read)
    words = ["average", *map(str, checkpoints), "--weights", "uniform", "-o", str(tmp_path / "merged")]
    capsys.readouterr()
    assert cli.main(words) == 143
    assert capsys.readouterr() == ("", "hf-radam average: ended by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_modules_are_imported_ends_it_at_once(tmp_path, number):
    """An exception raised there makes C++ that is importing something abort, with a trace of its own."""
    code = (
        "import importlib.abc, os, signal, sys\n"
        f"signal.signal({int(number)}, signal.default_int_handler)\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'hf_radam.cli.merging':\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from hf_radam import cli\n"
        "try:\n"
        "    sys.exit(cli.main(['average', 'a', 'b', '--weights', 'uniform', '-o', 'c']))\n"
        "except BaseException:\n"
        "    print('raised')\n"
        "    raise\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = limits.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"hf-radam average: ended by {number.name}\n"


def test_a_closed_pipe_is_no_error(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m hf_radam.cli schedule --max_steps 100 --optim radam | true; echo ${{PIPESTATUS[0]}}"
    done = limits.run(["bash", "-c", command], cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == ("0\n", "")
