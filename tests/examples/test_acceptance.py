"""The path that the package is made for, as a user types it: `accelerate launch examples/run_clm.py ... --ewa`.

The oracle is a sum of cross-entropies written out here, of the averaged weights that plain `from_pretrained` loads.
"""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import limits
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
WORDS = "def return class import self value name list text number".split()
BLOCK = 16
FLAGS = (
    "--optim radam --lr_scheduler_type wsd --ewa --max_steps 8 --decay_steps 0.25 --learning_rate 0.01 --block_size 16 "
    "--train_file train.txt --validation_file validation.txt --vocab_size 300 --save_strategy steps --save_steps 4 "
    "--eval_strategy steps --eval_steps 8 --max_eval_samples 8 --per_device_eval_batch_size 4 --report_to none "
    "--config_overrides hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=2 --use_cpu true"
)


def launch(folder, processes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kind = "ddp" if processes > 1 else "one_process"
    command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / f"{kind}.yaml"]
    command += ["--main_process_port", port, ROOT / "examples" / "run_clm.py", *FLAGS.split(), "--output_dir", "run"]
    here = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    printed = "\n".join(limits.communicate(process))
    assert process.returncode == 0, printed[-3000:]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_average_that_ships_has_the_loss_that_was_reported(tmp_path, processes):
    draw = random.Random(0)
    for name, count in (("train.txt", 3000), ("validation.txt", 400)):
        (tmp_path / name).write_text(" ".join(draw.choices(WORDS, k=count)) + "\n")
    launch(tmp_path, processes)
    checkpoint = tmp_path / "run" / "checkpoint-8"
    averaged = AutoModelForCausalLM.from_pretrained(checkpoint / "ewa").eval()
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(averaged.lm_head.weight, trained.lm_head.weight)
    assert (tmp_path / "run" / "_pre_decay" / "checkpoint-6" / "hf_radam.json").is_file()

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer((tmp_path / "validation.txt").read_text())["input_ids"]
    rows = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)[:8]
    with torch.no_grad():
        logits = averaged(input_ids=rows).logits
    log_probabilities = logits[:, :-1].double().log_softmax(-1)
    loss = -log_probabilities.gather(-1, rows[:, 1:, None]).mean()
    reported = json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_loss"]
    assert float(loss) == pytest.approx(reported, abs=1e-5)
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["eval_loss"] for entry in history if "eval_loss" in entry] == [pytest.approx(float(loss), abs=1e-5)]
