"""Commands that a signal ends: the exit code of shells, nothing left.

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

from hf_radam.checkpoints.weights import Tensors, write_weights

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_merge_that_is_stopped_leaves_nothing(large, tmp_path, number):
    words = ["average", *map(str, large), "--weights", "uniform", "-o", str(tmp_path / "m")]
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
    limits.wait_until(lambda: any(tmp_path.glob(".averaging-*/model")), process)
    process.send_signal(number)
    output, errors = limits.communicate(process)
    assert (process.returncode, output, errors) == (128 + number, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_modules_are_imported_ends_it_at_once(tmp_path, number):
    """An exception raised there makes C++ that is importing something abort, with a trace of its own."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job ignores
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'hf_radam.cli.merging': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from hf_radam import cli\n"
        "try: cli.main(['average', 'a', 'b', '--weights', 'uniform', '-o', 'c'])\n"
        "finally: print('raised')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = limits.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")


def test_a_closed_pipe_is_no_error(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m hf_radam.cli schedule --max_steps 100 --optim radam | true; echo ${{PIPESTATUS[0]}}"
    done = limits.run(["bash", "-c", command], cwd=tmp_path, env=environment)
    assert (done.stdout, done.stderr) == ("0\n", "")
