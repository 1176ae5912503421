"""`accelerate launch` with the files of `configs/accelerate/`, two processes on CPUs.

Oracles: the blocks that `clm_data.py` cuts from the same text in one process; the losses of the run over DDP, which the
others must find again; exit codes. The shim in `tests/processes/shim` stands in for the GPUs of FSDP2 and DeepSpeed.
"""

import importlib.util
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from clm_arguments import DataArguments, ModelArguments
from clm_data import load_texts, training_blocks

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("launch_probe.py")
RUN_CLM = ROOT / "examples" / "run_clm.py"
WORDS = "def return class import self value name list text number".split()
BATCH = 4  # blocks of each process and update
LIMIT = 200  # seconds; a launch takes 10 to 15 on a quiet machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launch:
    """One `accelerate launch`, its processes ended with it whatever happens."""

    def __init__(self, file, *arguments, cwd, script=PROBE, options=(), port=None, **environment):
        config = ROOT / "configs" / "accelerate" / f"{file}.yaml"
        port = ("--main_process_port", port or free_port())
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *port, *options]
        self.process = subprocess.Popen(
            [*map(str, command), str(script), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **self.environment(cwd), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def environment(cwd):
        return {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(cwd / "home"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }

    def finish(self):
        """Wait for the end; return (exit code, what it printed)."""
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail("the launch hangs:\n" + "\n".join(map(str, self.process.communicate()))[-3000:])
        return self.process.returncode, out + err

    def succeed(self):
        code, text = self.finish()
        assert code == 0, text[-5000:]
        return text


def shim(backend):
    return {"CPU_BACKEND": backend, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/processes/shim")])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts and the settings of all runs: one epoch of RAdam and EWA."""
    folder = tmp_path_factory.mktemp("launching")
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for i in range(21):
        (folder / "texts" / f"{i:02}.txt").write_text(" ".join(draw.choices(WORDS, k=draw.randint(50, 150))))
    settings = {
        "train_file": "texts",
        "validation_file": "validation.txt",
        "block_size": 16,
        "vocab_size": 300,
        "config_overrides": "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,"
        "num_key_value_heads=2",
        "optim": "radam",
        "ewa": True,
        "learning_rate": 0.02,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
    }
    (folder / "validation.txt").write_text(" ".join(draw.choices(WORDS, k=300)) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def arguments(output_dir, *more):
    return ("run.yaml", "--output_dir", output_dir, *more)


def cpu(output_dir, *more):
    return (*arguments(output_dir, *more), "--use_cpu", "true")


def probed(folder, name):
    """Make the folder in which the processes of a run write down what they did."""
    (folder / name).mkdir()
    return {"PROBE_FOLDER": str(folder / name)}


def seen(folder, name):
    return [json.loads((folder / name / f"{rank}.json").read_text()) for rank in (0, 1)]


def results(folder, name):
    return json.loads((folder / name / "all_results.json").read_text())


def losses(folder, name):
    state = json.loads((folder / name / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def expected_blocks(folder, streaming):
    """Cut the training text in this process, with the tokenizer that the run trained."""
    data_args = DataArguments(
        train_file=str(folder / "texts"), validation_file=str(folder / "validation.txt"), streaming=streaming
    )
    texts = load_texts(ModelArguments(cache_dir=str(folder / "cache")), data_args)
    tokenizer = AutoTokenizer.from_pretrained(folder / "ddp")
    return [tuple(block["input_ids"]) for block in training_blocks(texts["train"], tokenizer, 16, data_args)]


@pytest.fixture(scope="module")
def ddp(folder):
    """The run over DDP: what its processes printed."""
    return Launch("ddp", *cpu("ddp"), cwd=folder, **probed(folder, "ddp-seen")).succeed()


def test_each_process_has_its_own_blocks_and_none_is_lost(folder, ddp):
    blocks = expected_blocks(folder, streaming=False)
    shares = [[tuple(block) for update in rank["blocks"] for block in update] for rank in seen(folder, "ddp-seen")]
    both = Counter(chain(*shares))
    assert not Counter(blocks) - both
    # Upstream fills the last update of an epoch with blocks of its beginning; nothing else comes twice.
    assert len(blocks) % (2 * BATCH), "the epoch should end with an incomplete update"
    assert (both - Counter(blocks)).total() == -len(blocks) % (2 * BATCH)
    assert len(shares[0]) == len(shares[1]) == math.ceil(len(blocks) / (2 * BATCH)) * BATCH


def test_the_main_process_speaks_for_all(folder, ddp):
    assert ddp.count("training and ") == ddp.count("parameters (torch.float32)") == 1
    assert ddp.count("***** train metrics *****") == ddp.count("***** eval metrics *****") == 1
    assert ddp.count("Reading text for the tokenizer: 100%") == 1
    assert [rank["bars"] for rank in seen(folder, "ddp-seen")] == [True, False]


def test_the_prepared_data_are_written_once(folder, ddp):
    assert len(list((folder / "home").rglob("tokenizer-*"))) == 1
    assert not list((folder / "home").rglob("tmp*"))


def on_two_machines(*arguments, cwd, **environment):
    """Launch on two machines with a process each, both of which are this one."""
    port = free_port()
    machines = [
        Launch(
            "two_machines",
            *arguments,
            cwd=cwd,
            options=("--num_processes", 2, "--main_process_ip", "127.0.0.1", "--machine_rank", rank),
            port=port,
            **environment,
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        machine.succeed()


def test_a_stream_is_shared_in_its_order_and_goes_on_at_its_place_on_two_machines(folder, ddp):
    blocks = expected_blocks(folder, streaming=True)
    stream = ("--streaming", "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3)
    Launch("ddp", *cpu("stream", *stream), cwd=folder, **probed(folder, "stream-seen")).succeed()
    resume = ("--resume_from_checkpoint", "stream/checkpoint-3")
    on_two_machines(*cpu("resumed", *stream, *resume), cwd=folder, **probed(folder, "resumed-seen"))
    for name, first in (("stream", 0), ("resumed", 3)):
        for rank, process in enumerate(seen(folder, f"{name}-seen")):
            starts = [(2 * update + rank) * BATCH for update in range(first, 6)]
            assert [[tuple(block) for block in update] for update in process["blocks"]] == [
                blocks[start : start + BATCH] for start in starts
            ]
    assert losses(folder, "resumed") == losses(folder, "stream")
    assert results(folder, "resumed")["eval_loss"] == results(folder, "stream")["eval_loss"]


def test_a_process_that_fails_ends_the_launch(folder, ddp):
    environment = probed(folder, "failing-seen") | {"PROBE_FAIL": "1:2"}
    code, text = Launch("ddp", *cpu("failing"), cwd=folder, **environment).finish()
    assert code != 0
    assert "RuntimeError: this process fails" in text
    assert not (folder / "failing" / "all_results.json").exists()


def test_fsdp_that_would_be_ddp_is_one_sentence_and_an_error(folder):
    code, text = Launch("fsdp2", *cpu("refused"), cwd=folder, script=RUN_CLM).finish()
    assert code != 0
    assert text.count("run_clm.py: error: ") == text.count("FSDP was asked for, but") == 1, text[-3000:]
    assert "exitcode  : 2" in text


def test_fsdp2_finds_the_losses_of_ddp(folder, ddp):
    Launch("fsdp2", *arguments("fsdp2"), cwd=folder, **probed(folder, "fsdp2-seen"), **shim("fsdp")).succeed()
    for rank in seen(folder, "fsdp2-seen"):
        assert (rank["fsdp"], rank["kind"]) == (True, "DTensor")
    _compare(folder, "fsdp2")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero2_finds_the_losses_of_ddp(folder, ddp):
    Launch("zero2", *arguments("zero2"), cwd=folder, **probed(folder, "zero2-seen"), **shim("deepspeed")).succeed()
    for rank in seen(folder, "zero2-seen"):
        assert rank["deepspeed"]
    _compare(folder, "zero2")


def _compare(folder, name):
    # The same samples and sums, in another order: float32 differs in the last digits, and training carries that on.
    assert losses(folder, name) == pytest.approx(losses(folder, "ddp"), abs=1e-3)
    assert results(folder, name)["eval_loss"] == pytest.approx(results(folder, "ddp")["eval_loss"], abs=1e-3)
