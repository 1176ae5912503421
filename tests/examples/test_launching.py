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

import limits
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_clm
import run_clm
from clm_arguments import DataArguments, ModelArguments
from clm_data import load_texts, make_blocks

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("launch_probe.py")
WORDS = "def return class import self value name list text number".split()
BATCH = 4  # blocks of each process and step
STREAM = ["--streaming", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launch:
    """One `accelerate launch` of several runs; its processes end with it whatever happens."""

    def __init__(self, file, *runs, cwd, options=(), port=None, backend=""):
        config = ROOT / "configs" / "accelerate" / f"{file}.yaml"
        command = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            config,
            "--main_process_port",
            port or free_port(),
        ]
        runs = [["run.yaml", "--output_dir", *run, *([] if backend else ["--use_cpu", "true"])] for run in runs]
        environment = {
            "PROBE_RUNS": json.dumps(runs),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(ROOT / "tests/processes/shim")] if backend else [])]),
            "CPU_BACKEND": backend,
            "HF_HOME": str(cwd / "home"),
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
        self.process = subprocess.Popen(
            [sys.executable, *map(str, [*command, *options, PROBE])],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *, succeed=True):
        """Wait for the end; return what it printed."""
        try:
            text = "\n".join(limits.communicate(self.process))
        except subprocess.TimeoutExpired as error:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"the launch hangs:\n{error.stdout}\n{error.stderr}"[-3000:])
        assert (self.process.returncode == 0) is succeed, text[-5000:]
        return text


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
        "max_eval_samples": 16,  # whole batches: upstream weighs the last one of several processes roughly
        "report_to": "none",
    }
    (folder / "validation.txt").write_text(" ".join(draw.choices(WORDS, k=300)) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def ddp(folder):
    """Three runs over DDP, one of which fails in the end; return what the processes printed."""
    return Launch("ddp", ["ddp"], ["stream", *STREAM], ["failing"], cwd=folder).finish(succeed=False)


def seen(folder, name):
    return [json.loads((folder / f"{name}-seen-{rank}.json").read_text()) for rank in (0, 1)]


def results(folder, name):
    return json.loads((folder / name / "all_results.json").read_text())


def losses(folder, name):
    state = json.loads((folder / name / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def expected_blocks(folder, streaming):
    """Cut the training text in this process, with the tokenizer that the run trained."""
    files = {"train_file": str(folder / "texts"), "validation_file": str(folder / "validation.txt")}
    data_args = DataArguments(**files, streaming=streaming)
    texts = load_texts(ModelArguments(cache_dir=str(folder / "cache")), data_args)
    tokenizer = AutoTokenizer.from_pretrained(folder / "ddp")
    return [tuple(block["input_ids"]) for block in make_blocks(texts["train"], tokenizer, 16, data_args, None)[0]]


def test_each_process_has_its_own_blocks_and_none_is_lost(folder, ddp):
    blocks = expected_blocks(folder, streaming=False)
    shares = [[tuple(block) for step in rank["blocks"] for block in step] for rank in seen(folder, "ddp")]
    both = Counter(chain(*shares))
    assert not Counter(blocks) - both
    # Upstream fills the last step of an epoch with blocks of its beginning; nothing else comes twice.
    assert len(blocks) % (2 * BATCH), "the epoch should end with an incomplete step"
    assert (both - Counter(blocks)).total() == -len(blocks) % (2 * BATCH)
    assert len(shares[0]) == len(shares[1]) == math.ceil(len(blocks) / (2 * BATCH)) * BATCH


def test_two_processes_train_and_evaluate_as_one_does(folder, ddp, monkeypatch):
    monkeypatch.chdir(folder)
    alone = ["--use_cpu", "--per_device_train_batch_size", "8", "--output_dir", "alone", "--cache_dir", "own"]
    monkeypatch.setattr("sys.argv", ["run_clm.py", "run.yaml", *alone])
    run_clm.run()
    # But for the last step, which upstream fills for two processes alone; sums in another order.
    assert losses(folder, "alone")[:-1] == pytest.approx(losses(folder, "ddp")[:-1], abs=1e-3)
    # The average in a checkpoint of two processes is what they have evaluated, for plain transformers too.
    assert (folder / "stream" / "checkpoint-6" / "rng_state_1.pth").is_file()
    averaged = AutoModelForCausalLM.from_pretrained("stream/checkpoint-6/ewa").eval()
    args, tokenizer = evaluate_clm.parse_arguments(["stream"]), AutoTokenizer.from_pretrained("stream")
    blocks, _ = evaluate_clm.load_data(args, evaluate_clm.read_recipe(Path("stream")), tokenizer)
    loss = evaluate_clm.mean_loss(averaged, blocks, 5, "test")
    assert loss == pytest.approx(results(folder, "stream")["eval_loss"], abs=1e-5)


def test_the_main_process_logs_for_all_and_prepares_the_data_once(folder, ddp):
    assert ddp.count("training and ") == ddp.count("parameters (torch.float32)") == 3  # runs
    assert ddp.count("***** train metrics *****") == ddp.count("***** eval metrics *****") == 2
    assert [rank["bars"] for rank in seen(folder, "ddp")] == [True, False]
    assert len(list((folder / "home").rglob("tokenizer-*"))) == 1
    assert not list((folder / "home").rglob("tmp*"))


def test_a_process_that_fails_ends_the_launch(folder, ddp):
    assert "RuntimeError: this process fails" in ddp
    assert not (folder / "failing" / "all_results.json").exists()


def test_a_stream_is_shared_in_its_order_and_resumed_at_its_place_on_two_machines(folder, ddp):
    blocks = expected_blocks(folder, streaming=True)
    run, port = ["resumed", *STREAM, "--resume_from_checkpoint", "stream/checkpoint-3"], free_port()
    options = ("--num_processes", 2, "--main_process_ip", "127.0.0.1", "--machine_rank")  # both are this machine
    machines = [Launch("two_machines", run, cwd=folder, options=(*options, rank), port=port) for rank in (0, 1)]
    for machine in machines:
        machine.finish()
    for name, first in (("stream", 0), ("resumed", 3)):
        for rank, process in enumerate(seen(folder, name)):
            starts = [(2 * step + rank) * BATCH for step in range(first, 6)]
            assert [[tuple(block) for block in step] for step in process["blocks"]] == [
                blocks[start : start + BATCH] for start in starts
            ]
    assert losses(folder, "resumed") == losses(folder, "stream")
    assert results(folder, "resumed")["eval_loss"] == results(folder, "stream")["eval_loss"]


@pytest.mark.parametrize("file", ["fsdp2", "zero2"])
def test_sharded_back_ends_find_the_losses_of_ddp(file, folder, ddp):
    if file == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    Launch(file, [file], cwd=folder, backend={"fsdp2": "fsdp", "zero2": "deepspeed"}[file]).finish()
    for rank in seen(folder, file):
        assert rank["deepspeed"] if file == "zero2" else (rank["fsdp"], rank["kind"]) == (True, "DTensor")
    # The same samples and sums, in another order: float32 differs in the last digits, and training carries that on.
    assert losses(folder, file) == pytest.approx(losses(folder, "ddp"), abs=1e-3)
    assert results(folder, file)["eval_loss"] == pytest.approx(results(folder, "ddp")["eval_loss"], abs=1e-3)
