"""The path that the package is made for, as a user types it: `accelerate launch examples/run_clm.py ... --ewa`.

The oracle is a sum of cross-entropies written out here, of the averaged weights that plain `from_pretrained` loads.
"""

import json
import random

import pytest
import torch
from launched import ROOT, SHAPE, Launch, random_text
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 16
FLAGS = (
    "--optim radam --lr_scheduler_type wsd --ewa --max_steps 8 --decay_steps 0.25 --learning_rate 0.01 --block_size 16 "
    "--train_file train.txt --validation_file validation.txt --vocab_size 300 --save_strategy steps --save_steps 4 "
    "--eval_strategy steps --eval_steps 8 --max_eval_samples 8 --per_device_eval_batch_size 4 --report_to none "
    f"--config_overrides {SHAPE} --use_cpu true --output_dir run"
)


@pytest.mark.parametrize("file", ["one_process", "ddp"])
def test_the_average_that_ships_has_the_loss_that_was_reported(tmp_path, file):
    draw = random.Random(0)
    for name, words in (("train.txt", 3000), ("validation.txt", 400)):
        (tmp_path / name).write_text(random_text(draw, words) + "\n")
    printed = Launch(file, ROOT / "examples" / "run_clm.py", *FLAGS.split(), cwd=tmp_path).finish()
    checkpoint = tmp_path / "run" / "checkpoint-8"
    assert len(list(checkpoint.glob("rng_state*"))) == (2 if file == "ddp" else 1)  # one for each process
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

    # The main process logs for all, and prepares the data for all.
    once = ("training and ", "parameters (torch.float32)", "***** train metrics *****", "***** eval metrics *****")
    assert [printed.count(words) for words in once] == [1] * 4
    assert printed.count("training a tokenizer of ") == len(list((tmp_path / "home").rglob("tokenizer-*"))) == 1
    assert not list((tmp_path / "home").rglob("tmp*"))
