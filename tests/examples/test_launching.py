"""`accelerate launch` with the files of `configs/accelerate/`, two processes on CPUs.

Oracles: the blocks that `clm_data.py` cuts from the same text in one process; the losses of the run over DDP, which the
others must find again. The shim in `tests/processes/shim` stands in for the GPUs of FSDP2 and DeepSpeed.
"""

import importlib.util
import json
import math
import os
import random
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml
from launched import ROOT, SETTINGS, Launch, free_port, random_text, write_texts
from transformers import AutoTokenizer

import run_clm
from clm_arguments import DataArguments, ModelArguments
from clm_data import load_texts, make_blocks

PROBE = Path(__file__).with_name("launch_probe.py")
BATCH = SETTINGS["per_device_train_batch_size"]  # blocks of each process and step
STREAM = ["--streaming", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
RUNS = [["ddp"], ["stream", *STREAM], ["resumed", *STREAM, "--resume_from_checkpoint", "stream/checkpoint-3"]]


def launch(file, runs, folder, *flags, **options):
    runs = [["run.yaml", "--output_dir", *run, *flags] for run in runs]
    return Launch(file, PROBE, cwd=folder, PROBE_RUNS=json.dumps(runs), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts and the settings of all runs: one epoch of RAdam and EWA."""
    folder = tmp_path_factory.mktemp("launching")
    write_texts(folder / "texts", count=21, words=(50, 150))
    settings = SETTINGS | {
        "validation_file": "validation.txt",
        "learning_rate": 0.02,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_eval_batch_size": 4,
        "max_eval_samples": 16,  # whole batches: upstream weighs the last one of several processes roughly
        "disable_tqdm": True,
    }
    (folder / "validation.txt").write_text(random_text(random.Random(1), 300) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def ddp(folder):
    """The runs over DDP on two machines, which are both this one."""
    machines, port = [], free_port()
    for rank in (0, 1):
        options = ("--num_processes", 2, "--main_process_ip", "127.0.0.1", "--machine_rank", rank)
        own = {"options": options, "port": port, "HF_HOME": str(folder / f"home-{rank}")}
        machines.append(launch("two_machines", RUNS, folder, "--use_cpu", "true", **own))
    for machine in machines:
        machine.finish()


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


def test_two_processes_train_as_one_does(folder, ddp, monkeypatch):
    monkeypatch.chdir(folder)
    alone = ["--use_cpu", "--per_device_train_batch_size", "8", "--output_dir", "alone", "--cache_dir", "own"]
    monkeypatch.setattr("sys.argv", ["run_clm.py", "run.yaml", *alone])
    run_clm.run()
    # But for the last step, which upstream fills for two processes alone; sums in another order.
    assert losses(folder, "alone")[:-1] == pytest.approx(losses(folder, "ddp")[:-1], abs=1e-3)


def test_a_stream_is_shared_in_its_order_and_resumed_at_its_place(folder, ddp):
    blocks = expected_blocks(folder, streaming=True)
    for name, first in (("stream", 0), ("resumed", 3)):
        for rank, process in enumerate(seen(folder, name)):
            starts = [(2 * step + rank) * BATCH for step in range(first, 6)]
            assert [[tuple(block) for block in step] for step in process["blocks"]] == [
                blocks[start : start + BATCH] for start in starts
            ]
    assert losses(folder, "resumed") == losses(folder, "stream")
    assert results(folder, "resumed")["eval_loss"] == results(folder, "stream")["eval_loss"]


@pytest.mark.parametrize(("file", "backend"), [("fsdp2", "fsdp"), ("zero2", "deepspeed")])
def test_sharded_back_ends_find_the_losses_of_ddp(file, backend, folder, ddp):
    if backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "processes" / "shim")])
    launch(file, [[file]], folder, PYTHONPATH=paths, CPU_BACKEND=backend).finish()
    for rank in seen(folder, file):
        assert rank["deepspeed"] if backend == "deepspeed" else rank["kind"] == "DTensor"
    # The same samples and sums, in another order: float32 differs in the last digits, and training carries that on.
    assert losses(folder, file) == pytest.approx(losses(folder, "ddp"), abs=1e-3)
    assert results(folder, file)["eval_loss"] == pytest.approx(results(folder, "ddp")["eval_loss"], abs=1e-3)
